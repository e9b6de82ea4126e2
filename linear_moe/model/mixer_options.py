"""Options of mixers on a command line, the Config that they make in a model, and the layouts that a mixer knows.

Imports no Megatron: the trainer reads its command line with this, and the launcher looks at it before the start.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from linear_moe import lsm
from linear_moe.kernels.checks import MAX_HEAD_DIM
from linear_moe.lsm import Mixer
from linear_moe.lsm.flags import flag_of, options_of
from linear_moe.lsm.tables import LAYOUTS
from linear_moe.model.pattern import SOFTMAX

SHARED_FLAGS = {
    "--expand-k": "expand_k",
    "--expand-v": "expand_v",
    "--la-feature-map": "feature_map",
    "--la-output-norm": "output_norm",
    "--la-gate-fn": "output_gate",
    "--la-norm-eps": "norm_eps",
    "--la-conv-size": "conv_size",
    "--la-norm-q": "norm_q",
    "--la-norm-k": "norm_k",
    "--la-tie-feature-map-qk": "tie_feature_map_qk",
    "--la-do-feature-map-norm": "normalize",
    "--mom-num-memories": "num_memories",
    "--mom-topk": "topk",
    "--mom-capacity": "capacity",
    "--mom-shared-memory": "shared_memory",
    "--mom-single-projection": "single_projection",
    "--mom-aux-loss-coeff": "aux_loss_coeff",
}
"""Flags of the earlier system and those of mixtures, and the field they set on every mixer that has it."""


def add_mixer_options(parser: argparse._ActionsContainer) -> None:
    """The flags of every registered mixer, and those for all of them."""
    for flag, field in SHARED_FLAGS.items():
        help_text = f"{field} of every mixer that has it; alone: true"
        parser.add_argument(flag, dest=f"la_{field}", default=None, nargs="?", const="true", help=help_text)
    for name in lsm.names():
        for field, kind, help_text in options_of(lsm.get(name).Config):
            flag, shown = flag_of(name, field), help_text.replace("%", "%%")
            parser.add_argument(
                flag, dest=f"{name}:{field}", default=None, type=kind, metavar="X", help=shown
            )


def take_mixer_options(args: argparse.Namespace, layer_kinds: Collection[str]) -> dict[str, dict[str, Any]]:
    """What is set, by mixer and field; mixers' own flags are taken out of ``args``.

    Raises:
        ValueError: an unknown mixer, a value that cannot be read, or a flag for all mixers that none of ``layer_kinds``
            has.
    """
    _check_shared_flags(args, layer_kinds)
    found = {name: _given(args, name) for name in lsm.names()}
    for name in lsm.names():
        for field, _, _ in options_of(lsm.get(name).Config):
            delattr(args, f"{name}:{field}")
    return {name: given for name, given in found.items() if given}


def config_of(
    kind: str, options: dict[str, Any], *, typed: Collection[str] = (), **shape: Any
) -> Mixer.Config:
    """The Config of a mixer in a model of this shape; ``ValueError`` for an unknown or impossible option.

    Args:
        kind: registered name.
        options: by field of its Config; they win over the shape.
        typed: flags of the command line that set them; an error says `--la-conv-size` to whoever typed that.
        shape: ``hidden_size``, ``num_heads``, ``head_dim``, ``layers_of_kind``, ``qkv_bias``, ``norm_eps``.
    """
    config_class = lsm.get(kind).Config
    known = [f.name for f in dataclasses.fields(config_class)]
    for name in options:
        if name not in known:
            raise ValueError(
                f"mixer {kind} has no option {name!r}\n  why: it knows {', '.join(known)}\n  try: one of these"
            )
    try:
        return config_class.from_model(**(shape | options))
    except ValueError as error:
        raise ValueError(_in_flags(str(error), kind, typed)) from None


def _in_flags(error: str, kind: str, typed: Collection[str]) -> str:
    """An error about fields of a Config, in the words of a command line: what to type is a flag and its value."""
    what, _, rest = error.partition("\n  why: ")
    why, _, attempt = rest.partition("\n  try: ")
    flags = {field: flag_of(kind, field) for field, _, _ in options_of(lsm.get(kind).Config)}
    shared = {field: flag for flag, field in SHARED_FLAGS.items() if field in flags and flag in typed}
    flags |= {field: flag for field, flag in shared.items() if flags[field] not in typed}
    own = flags.get(what.partition(" ")[0])
    if own is None or not attempt:
        return error  # of a mixer from elsewhere, in words of its own
    # Fields of one word are English words, too, where a reason is given.
    long = {field: flag for field, flag in flags.items() if "_" in field}
    what, why, attempt = _renamed(what, flags), _renamed(why, long), _renamed(attempt, flags)
    attempt = re.sub(r"^(?!None)([^\s,]+)(?=,| or |$)", f"{own} \\1", attempt)
    attempt = re.sub(r"\bNone\b", "leave it out", attempt)
    return f"{what}\n  why: {why}\n  try: {attempt}"


def _renamed(text: str, names: dict[str, str]) -> str:
    return re.sub(rf"(?<![\w-])({'|'.join(names)})(?![\w-])", lambda found: names[found[1]], text)


def check_supported(mixer: Mixer | type[Mixer], layouts: Mapping[str, bool]) -> None:
    """Refuse a mixer under a layout that its file says it cannot take.

    Args:
        mixer: whose ``unsupported`` counts.
        layouts: whether a run has them, by the keys of ``LAYOUTS``.

    Raises:
        ValueError: it has one of them, with the mixer's reason.
    """
    for layout, why in mixer.unsupported.items():
        if layouts.get(layout):
            raise ValueError(
                f"mixer {mixer.name} does not support {LAYOUTS[layout]} ({layout})\n"
                f"  why: {why}\n"
                f"  try: a run without it, or another mixer (python -m linear_moe.lsm says what each one takes)"
            )


def check_layout(
    mixer: Mixer, kind: str, layer_kinds: Sequence[str], *, tp: int, cp: int, recomputes_layers: bool
) -> None:
    """Whether a mixer trains under a layout; ``ValueError`` where it does not."""
    if mixer.cfg.num_heads % tp:
        raise ValueError(
            f"the {mixer.cfg.num_heads} heads of {kind} cannot be divided over tensor parallel size {tp}\n"
            f"  why: every rank computes whole heads\n"
            f"  try: a TP that divides {mixer.cfg.num_heads}, or another head size (python -m linear_moe.lsm)"
        )
    widest = max(width for shape in mixer.memory_shapes() for width in shape)
    if widest > MAX_HEAD_DIM:
        raise ValueError(
            f"a memory of {kind} is {widest} channels wide\n"
            f"  why: the kernels take keys and values of up to {MAX_HEAD_DIM}\n"
            f"  try: a smaller --expand-k or --expand-v, or more heads"
        )
    if cp > 1 and getattr(mixer.cfg, "capacity", None) is not None:
        raise ValueError(
            f"{kind} has a capacity, which context parallelism does not know\n"
            f"  why: whether a memory still takes a token depends on the tokens of other ranks\n"
            f"  try: CP=1, or no --mom-capacity (memories then take all their tokens)"
        )
    if recomputes_layers and mixer.first_value is not None and layer_kinds.count(kind) > 1:
        raise ValueError(
            f"{kind} does not train with full recomputation of layers\n"
            f"  why: its first layer hands a value to the later ones, which recomputing one layer would lose\n"
            f"  try: AC=sel (--recompute-granularity selective)"
        )


def _check_shared_flags(args: argparse.Namespace, layer_kinds: Collection[str]) -> None:
    """Refuse an option that no layer of the model has: it would change nothing."""
    kinds = sorted(set(layer_kinds) - {SOFTMAX})
    known = {field for kind in kinds for field, _, _ in options_of(lsm.get(kind).Config)}
    for flag, field in SHARED_FLAGS.items():
        if getattr(args, f"la_{field}", None) is not None and field not in known:
            raise ValueError(
                f"{flag} is set, but no layer of this model has {field}\n"
                f"  why: the layers are {', '.join([*kinds, SOFTMAX])}\n"
                f"  try: leave it out, or another LA_MODULE (python -m linear_moe.lsm lists all)"
            )


def _given(args: argparse.Namespace, mixer: str) -> dict[str, Any]:
    """The options set for one mixer: the flags for all, then its own."""
    given = {}
    flags = {field: flag for flag, field in SHARED_FLAGS.items()}
    for field, kind, _ in options_of(lsm.get(mixer).Config):
        shared, own = getattr(args, f"la_{field}", None), getattr(args, f"{mixer}:{field}")
        if shared is not None:
            given[field] = _parsed(flags[field], kind, shared)
        if own is not None:
            given[field] = own
    return given


def _parsed(flag: str, kind: Callable[[str], Any], text: str) -> Any:
    try:
        return kind(text)
    except ValueError as error:
        raise ValueError(
            f"{flag} is {text!r}\n  why: it cannot be read ({error})\n  try: leave it out for the mixer's default"
        ) from None
