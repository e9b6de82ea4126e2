"""What is compared: which models, at which size of memory, and the tiny model that all of them are.

A cell of the table is a model, a size and a seed. A model is the kinds of its layers joined by `+` and repeated
(`gla`, `softmax`, `gla+softmax`); a size is `default`, or a number of elements that the recurrent memory of one layer
shall have, for which heads, their width and at last the mixer's own sizes are chosen. Everything else is the same for
all: width, depth, feed-forward, short convolution (as in arXiv:2312.04927's own comparison: without one, a mixer has to
learn to look one token back before it can bind a value to its key, and that is not what is measured).
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import mqar
import torch
import torch.nn.functional as F

from linear_moe import lsm
from linear_moe.inference.load import join_single_process
from linear_moe.model.builder import LinearMoEBuilder, LinearMoEModelConfig
from linear_moe.model.config import LinearMoEConfig, mixer_config
from linear_moe.model.pattern import SOFTMAX

DEFAULT = "default"
NEAR = 0.15
"""A memory this much larger or smaller than asked for, in octaves, counts as equal."""


@dataclass(frozen=True)
class Setup:
    """Everything that two cells of one table have in common."""

    task: mqar.Task = field(default_factory=mqar.Task)
    """What is recalled."""
    hidden_size: int = 64
    """Width of the model."""
    num_layers: int = 2
    """Layers, each with a dense feed-forward block of twice the width."""
    num_heads: int = 2
    """Heads of softmax attention, and of mixers at their default size."""
    conv_size: int = 4
    """Short convolution of every mixer that has one; 0: what each mixer comes with."""
    steps: int = 1500
    """Optimizer steps."""
    per_pairs: int = 16
    """Sequences of each number of pairs in a batch."""
    lr: float = 3e-3
    """Peak learning rate."""
    init_std: float = 0.02
    """Standard deviation of the weights at the start."""
    weight_decay: float = 0.1
    """Of matrices."""
    test_per_pairs: int = 256
    """Sequences of each number of pairs in the test."""

    def fingerprint(self) -> str:
        """Cells with the same one belong in one table."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Job:
    """The cells of one model at one size: their seeds train together."""

    model: str
    size: str
    seeds: tuple[int, ...]

    @property
    def kinds(self) -> list[str]:
        """The kinds of its layers, before they repeat."""
        return self.model.split("+")

    @property
    def mixer(self) -> str | None:
        """The mixer whose memory the size is about, if there is one."""
        return next((kind for kind in self.kinds if kind != SOFTMAX), None)


def plan(
    models: list[str], hybrids: list[str], equal: int, ladder: list[str], seeds: tuple[int, ...]
) -> list[Job]:
    """The most telling first, so that a short run leaves out what matters least.

    Equal size, hybrids, ladder, defaults; then mixtures of memories over any mixer but those of ``hybrids``.
    """
    late = [m for m in models if m.startswith("mom_") and m.removeprefix("mom_") not in hybrids]
    early = [m for m in models if m not in late and m != SOFTMAX]
    jobs = [(model, str(equal)) for model in early]
    jobs += [(SOFTMAX, DEFAULT)] if SOFTMAX in models else []
    jobs += [(f"{mixer}+{SOFTMAX}", str(equal)) for mixer in hybrids]
    jobs += [(mixer, str(size)) for size in (equal // 4, equal * 4) for mixer in ladder]
    jobs += [(model, DEFAULT) for model in early]
    jobs += [(model, size) for size in (str(equal), DEFAULT) for model in late]
    return [Job(model, size, seeds) for model, size in dict.fromkeys(jobs)]


def state_size(mixer: lsm.Mixer) -> int:
    """Elements of the recurrent memory of a layer; the tail of the short convolution is not counted."""
    return mixer.cfg.num_heads * sum(keys * values for keys, values in mixer.memory_shapes())


def options(kind: str, size: str, setup: Setup) -> dict[str, Any]:
    """The options of a mixer that give it the memory asked for.

    Raises:
        ValueError: no combination of heads, widths and the mixer's own sizes comes near.
    """
    base = _with_conv(kind, _fitting(kind, setup), setup)
    if size == DEFAULT:
        return base
    wanted = int(size)
    best = min(_choices(kind, base, setup), key=lambda choice: _cost(*choice, wanted, setup), default=None)
    if best is None or abs(math.log2(state_size(best[1]) / wanted)) > 1:
        raise ValueError(
            f"{kind} cannot have a memory of about {wanted} elements\n"
            f"  why: heads of 4 to 128 channels and its own sizes were tried\n"
            f"  try: --state-size {state_size(make(kind, base, setup))}"
        )
    return best[0]


def make(kind: str, chosen: dict[str, Any], setup: Setup) -> lsm.Mixer:
    """The mixer as the model would make it; ``ValueError`` if its options do not fit."""
    return lsm.get(kind)(mixer_config(kind, _transformer([kind], {kind: chosen}, setup)))


def build(job: Job, setup: Setup, seed: int) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The model, in training mode, on the CUDA device if there is one, and what the table says about it."""
    join_single_process(seed)
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    chosen = {kind: options(kind, job.size, setup) for kind in job.kinds if kind != SOFTMAX}
    config = LinearMoEModelConfig(
        transformer=_transformer(job.kinds, chosen, setup),
        vocab_size=setup.task.vocab_size,
        seq_length=setup.task.length,
        should_pad_vocab=False,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = LinearMoEBuilder(config).build_model(groups, pre_process=True, post_process=True)
    model = model.to("cuda") if torch.cuda.is_available() else model
    facts = {
        "state_size": state_size(make(job.mixer, chosen[job.mixer], setup)) if job.mixer else None,
        "options": chosen,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    return model, facts


def _transformer(kinds: list[str], chosen: dict[str, dict[str, Any]], setup: Setup) -> LinearMoEConfig:
    return LinearMoEConfig(
        num_layers=setup.num_layers,
        hidden_size=setup.hidden_size,
        num_attention_heads=setup.num_heads,
        ffn_hidden_size=2 * setup.hidden_size,
        layer_kinds=(kinds * setup.num_layers)[: setup.num_layers],
        mixer_options=chosen,
        transformer_impl="local",
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        bias_dropout_fusion=False,
        init_method_std=setup.init_std,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=torch.float32,
    )


def _fitting(kind: str, setup: Setup) -> dict[str, Any]:
    """Nothing; or the one size of the mixer's own that is too large for so narrow a model, halved until it fits."""
    try:
        make(kind, {}, setup)
        return {}
    except ValueError as error:
        known = {f.name for f in dataclasses.fields(lsm.Mixer.Config)}
        for option in dataclasses.fields(lsm.get(kind).Config):
            value = option.default
            while option.name not in known and type(value) is int and value >= 4:
                value //= 2
                try:
                    make(kind, {option.name: value}, setup)
                    return {option.name: value}
                except ValueError:
                    continue
        raise error


def _with_conv(kind: str, chosen: dict[str, Any], setup: Setup) -> dict[str, Any]:
    """The options with the short convolution that all share, unless the mixer has none (token shift instead)."""
    with_conv = chosen | {"conv_size": setup.conv_size}
    try:
        mixer = make(kind, with_conv, setup)
    except ValueError:
        return chosen
    return with_conv if setup.conv_size and mixer.conv_channels else chosen


def _choices(
    kind: str, base: dict[str, Any], setup: Setup
) -> Iterator[tuple[dict[str, Any], lsm.Mixer, float]]:
    """Options, their mixer, and how many octaves a size of the mixer's own is away from its default."""
    config = _transformer([kind], {kind: base}, setup)
    grid = itertools.product((1, 2, 3, 4, 6, 8), (*range(4, 32, 4), *range(32, 136, 8)))
    heads_and_widths: list[dict[str, Any]] = [{}, *({"num_heads": h, "head_dim": d} for h, d in grid)]
    for own, octaves in _own_sizes(kind, base, setup):
        for shape in heads_and_widths:
            chosen = base | own | shape
            config.mixer_options = {kind: chosen}
            try:
                mixer = lsm.get(kind)(mixer_config(kind, config))
                shapes = mixer.memory_shapes()
            except (ValueError, AssertionError):
                continue
            if max(max(shape) for shape in shapes) <= 256:  # what the kernels take
                yield chosen, mixer, octaves


def _own_sizes(kind: str, base: dict[str, Any], setup: Setup) -> Iterator[tuple[dict[str, int], float]]:
    """Nothing changed, then one whole-number option that changes the memory: slots, features, state channels."""
    yield {}, 0.0
    mixer = make(kind, base, setup)
    known = {f.name for f in dataclasses.fields(lsm.Mixer.Config)}
    for option in dataclasses.fields(mixer.cfg):
        value = getattr(mixer.cfg, option.name)
        if option.name in known or type(value) is not int or value < 2:
            continue
        for octaves in (-1, 1, -2, 2, -3, -4):
            other = int(value * 2**octaves)
            try:
                changed = state_size(make(kind, base | {option.name: other}, setup)) != state_size(mixer)
            except (ValueError, AssertionError):
                continue
            if changed:
                yield {option.name: other}, abs(octaves)


def _cost(chosen: dict[str, Any], mixer: lsm.Mixer, octaves: float, wanted: int, setup: Setup) -> float:
    """The memory first; then a layer as wide as the model, the mixer's own sizes, heads of 16 channels at least."""
    cfg = mixer.cfg
    off = abs(math.log2(state_size(mixer) / wanted))
    width = abs(math.log2(cfg.num_heads * cfg.head_v_dim / setup.hidden_size))
    narrow = max(0.0, math.log2(16 / min(min(shape) for shape in mixer.memory_shapes())))
    heads = abs(math.log2(cfg.num_heads / setup.num_heads))
    return 20 * max(0.0, off - NEAR) + off + width + octaves + 0.5 * narrow + 0.1 * heads
