"""The command line of an imported model: that of a training which would have made it. Imports no Megatron."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence

from linear_moe.checkpoint.hf_config import Described
from linear_moe.model.families import megatron_arguments, padded_vocab_size
from linear_moe.model.pattern import SOFTMAX

_NARROW = ("based", "rebased")
"""Their feature maps square the width of a key: it stays as it is."""


def model_arguments(described: Described, kinds: Sequence[str]) -> list[str]:
    """Flags of the model; those of the training are there because some must be."""
    size = described.size
    _refuse_other_mixers(described, kinds)
    if described.arguments is not None:
        return _exported_arguments(described, kinds)
    argv = ["--family", described.family.name, "--model-size", described.size_name]
    argv += ["--layer-kinds", ",".join(kinds), *megatron_arguments(described.family, size)]
    argv += described.mixer_arguments
    argv += ["--seq-length", str(min(size.max_position_embeddings, 2048)), "--init-method-std", "0.02"]
    return [*argv, *_of_a_training(described)]


_FINAL = {
    "qwen3_next": "its softmax layers have an output gate, which no other mixer continues",
    "mamba2": "only the projections of softmax layers can be carried over, and it has none",
}
"""Why models of some types stay as they are."""


def _refuse_other_mixers(described: Described, kinds: Sequence[str]) -> None:
    kind = described.model_type
    if kind in _FINAL and tuple(kinds) != described.kinds:
        raise ValueError(
            f"a model of type {kind} cannot get other mixers\n"
            f"  why: {_FINAL[kind]}\n"
            f"  try: the model as it is (no LA_MODULE, no LAYER_TYPE_LIST)"
        )


def _exported_arguments(described: Described, kinds: Sequence[str]) -> list[str]:
    assert described.arguments is not None
    argv = list(described.arguments)
    for flag in ("--layer-kinds", "--la-module", "--layer-type-list", "--padded-vocab-size"):
        if flag in argv:
            place = argv.index(flag)
            del argv[place : place + 2]
    changed = [i for i, kind in enumerate(kinds) if described.kinds[i] not in (SOFTMAX, kind)]
    if changed:
        raise ValueError(
            f"layer {changed[0]} of the model is {described.kinds[changed[0]]}, not softmax\n"
            f"  why: only the projections of softmax layers can be carried over to another mixer\n"
            f"  try: a pattern that leaves layers {', '.join(map(str, changed))} as they are{_same(described.kinds)}"
        )
    return [*argv, "--layer-kinds", ",".join(kinds), *_of_a_training(described)]


def _same(kinds: Sequence[str]) -> str:
    mixers = sorted(set(kinds) - {SOFTMAX})
    if len(mixers) > 1:
        return ""
    symbols = "".join("N" if kind == SOFTMAX else "L" for kind in kinds)
    return f"; LA_MODULE={mixers[0]} LAYER_TYPE_LIST={symbols} is all of them"


def _of_a_training(described: Described) -> list[str]:
    argv = ["--micro-batch-size", "1", "--train-iters", "1", "--lr", "1e-4"]
    argv += {"bfloat16": ["--bf16"], "float16": ["--fp16"], "float32": []}[described.dtype]
    return [*argv, "--padded-vocab-size", str(padded_vocab_size(described.size.vocab_size))]


def check_options(given: Sequence[str]) -> None:
    """``ValueError`` where arguments of the user are not of mixers: all else of a model is its source's."""
    from linear_moe.model.mixer_options import add_mixer_options

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    add_mixer_options(parser)
    parser.add_argument("--mixer-module")
    try:
        others = parser.parse_known_args(list(given))[1]
    except argparse.ArgumentError:  # a value of a mixer's option: told when the model is built
        return
    if others:
        raise ValueError(
            f"--extra-args has {' '.join(others)}, which is no option of a mixer\n"
            f"  why: an import is the model of its config.json, but for its mixers\n"
            f"  try: python -m linear_moe.training.pretrain --help, which lists theirs; others when training from it"
        )


def linear_options(kinds: Collection[str], given: Sequence[str]) -> list[str]:
    """Arguments that let mixers take over whole heads and start with a gate that is neither shut nor in the way.

    Args:
        kinds: of the layers.
        given: arguments of the user, which win.
    """
    from linear_moe import lsm  # torch, which a launcher imports for this only

    flags = {word.split("=")[0] for word in given}
    shared = {"expand_k": "--expand-k", "expand_v": "--expand-v", "output_gate": "--la-gate-fn"}
    wanted = {"expand_k": (0.5, "1.0"), "expand_v": (2.0, "1.0"), "output_gate": ("swish", "sigmoid")}
    found = []
    for kind in sorted(set(kinds) - {SOFTMAX}):
        config = lsm.get(kind).Config
        for field, (default, value) in wanted.items():
            flag = f"--{kind}-{field}".replace("_", "-")
            is_default = getattr(config, field) == default
            if is_default and kind not in _NARROW and not flags & {flag, shared[field]}:
                found += [flag, value]
    return found
