"""Every mixer, every option worth a case, and random inputs: what the contract suite runs over.

A mixer is tested by being registered. One that lives outside the package is imported by name:
``CONTRACT_MODULES=my_package.my_mixer pytest tests/contract``.

Which cases run where, so that the suite stays within its 90 seconds:

* Every mixer with its defaults runs every check. Exceptions are the mixtures of memories: all share one file, so the
  two of the paper run every check and the others (``BRIEF``) what an inner mixer could upset: the tables, the token
  loop, documents, decoding, packed context parallelism at one size, and two layouts of the layer.
* Every option (``EVERY_CASE``) runs the token loop with all gradients, the formulas and the tables. What only changes
  the output's norm or gate acts on single tokens after the memory was read: ``MEMORY_CASES`` leaves it out of packed
  documents and decoding.
* Across ranks one option case runs, at the size with the shortest chunks: another width of the convolution, with
  biases. All other options end in ``gates``, which see one token at a time (``test_gates_are_of_one_token``, which
  runs every case), or in the kernels, which the defaults send over ranks at every size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from linear_moe import lsm
from linear_moe.lsm import Mixer, MixerState, Placement, registry
from tests.contract.outsider import Outsider

for module in filter(None, os.environ.get("CONTRACT_MODULES", "").split(",")):
    importlib.import_module(module)

MIXERS = (*lsm.names(), "outsider")
MIXTURES = ("mom_gated_deltanet", "mom_gla")
"""Of all mixtures of memories those that run every check, the paper's."""
SHAPE = {"hidden_size": 16, "num_heads": 4, "head_dim": 8, "layers_of_kind": 3}
PLACE = Placement(num_heads=4, layer=1, num_layers=3, layer_of_kind=1)

COMMON: dict[str, dict[str, Any]] = {
    "bias": {"qkv_bias": True},
    "bias_conv": {"qkv_bias": True, "conv_size": 3},
    "no_conv": {"conv_size": 0},
    "sigmoid": {"output_gate": "sigmoid"},
    "bare": {"output_gate": "none", "output_norm": "identity"},
    "wide": {"expand_v": 2.0},
}
"""Options that every mixer has."""

OWN: dict[str, dict[str, dict[str, Any]]] = {
    "linear_attention": {
        "tied": {"feature_map": "hedgehog", "tie_feature_map_qk": True},
        "tied_product": {"feature_map": "elementwise_product", "tie_feature_map_qk": True},
        "normalized_map": {"feature_map": "hedgehog", "normalize": True, "norm_q": True, "norm_k": True},
    },
    "based": {
        "odd_keys": {"feature_dim": 5},
        "narrow": {"expand_k": 0.25},
        "normed": {"output_norm": "rmsnorm", "output_gate": "swish"},
    },
    "rebased": {"odd_keys": {"feature_dim": 5}, "bare_keys": {"use_gamma": False, "normalize": False}},
    "deltanet": {
        "overwrite": {"use_beta": False, "allow_neg_eigval": True},
        "gated": {"output_gate": "swish"},
    },
    "gated_deltanet": {"two_values": {"values_per_key": 2}},
    "kda": {"bounded": {"lower_bound": -2.0}, "narrow": {"gate_rank": 3}},
    "rwkv6": {
        "narrow": {"shift_rank": 3, "decay_rank": 2, "expand_k": 1.0},
        "rms": {"output_norm": "rmsnorm"},
    },
    "rwkv7": {
        "narrow": {"decay_rank": 2, "iclr_rank": 3, "value_rank": 4, "gate_rank": 5},
        "rms": {"output_norm": "rmsnorm"},
        "half_keys": {"expand_k": 0.5},
    },
    "mamba2": {
        "two_groups": {"num_groups": 2},
        "four_groups": {"num_groups": 4},
        "limits": {"dt_limit_min": 0.6, "dt_limit_max": 0.9, "state_size": 6},
    },
    "retention": {"narrow_keys": {"expand_k": 0.5, "rotary": "xpos", "rotary_base": 100.0}},
    "gsa": {"few_slots": {"num_slots": 5, "gate_logit_normalizer": 2.0}},
    "hgrn2": {"narrow_keys": {"expand_k": 0.5}},
    "gla": {"clamp": {"gate_clamp_min": -0.03}, "wide_keys": {"expand_k": 1.0}},
    **{name: {"one_choice": {"topk": 1}, "alone": {"topk": 1, "shared_memory": False}} for name in MIXTURES},
}
OWN["mom_gated_deltanet"]["two_values"] = {"values_per_key": 2}
"""Options that cannot be found from the types of a Config: flags are flipped and words tried by themselves."""


IN_MODEL: dict[str, dict[str, Any]] = {
    "mamba2": {"ssm_head_dim": 8, "state_size": 12},
    "hgrn2": {"expand_ratio": 4},
}
IN_MODEL |= {f"mom_{name}": given for name, given in IN_MODEL.items()}
"""Options with which a mixer that chooses its own heads has four in the layers of the tests (hidden size 16)."""


def mixer_class(name: str) -> type[Mixer]:
    return Outsider if name == Outsider.name else lsm.get(name)


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """The outsider in the registry, for code that looks mixers up."""
    registry._MIXERS[Outsider.name] = Outsider
    try:
        yield
    finally:
        del registry._MIXERS[Outsider.name]


def own_fields(name: str) -> dict[str, Any]:
    """Type of each option that a mixer adds to the common ones."""
    hints = typing.get_type_hints(mixer_class(name).Config)
    common = {field.name for field in dataclasses.fields(Mixer.Config)}
    names = [field.name for field in dataclasses.fields(mixer_class(name).Config)]
    return {field: hints[field] for field in names if field not in common}


def words(name: str, field: str) -> list[str]:
    """What an option may say, out of the error that another word gets."""
    try:
        mixer_class(name).Config(**SHAPE, **{field: "nonsense"})
    except ValueError as error:
        found = re.search(r"known are (.*)", str(error))
        assert found, error
        return found[1].split(", ")
    raise AssertionError(f"{name} takes any {field}")


@cache
def options(name: str) -> dict[str, dict[str, Any]]:
    """The cases of a mixer: its defaults, the common options, its own flags flipped and each of its words."""
    config = mixer_class(name).Config(**SHAPE)
    cases: dict[str, dict[str, Any]] = {"defaults": {}, **COMMON, **OWN.get(name, {})}
    for field, kind in own_fields(name).items():
        if kind is bool:
            cases[field] = {field: not getattr(config, field)}
        elif kind is str:
            cases |= {f"{field}_{word}": {field: word} for word in words(name, field)}
    changed = {case: given for case, given in cases.items() if config != dataclasses.replace(config, **given)}
    return {"defaults": {}} | changed


BRIEF = [name for name in MIXERS if mixer_class(name).uses_hidden and name not in MIXTURES]
DISTINCT = [name for name in MIXERS if name not in BRIEF]
"""Mixers with code of their own."""

EVERY_CASE = [(name, case) for name in DISTINCT for case in options(name)]
EVERY_CASE += [(name, "defaults") for name in BRIEF]


def _reaches_the_memory(name: str, case: str) -> bool:
    given = options(name)[case]
    return not given or any(not field.startswith("output_") for field in given)


MEMORY_CASES = [pair for pair in EVERY_CASE if _reaches_the_memory(*pair)]


@dataclass
class Inputs:
    """Arguments of :meth:`Mixer.mix`, tensors of it being leaves."""

    mixer: Mixer
    x: Tensor
    others: dict[str, Tensor]
    w: dict[str, Tensor]
    state: MixerState | None
    place: Placement = PLACE

    def tensors(self) -> dict[str, Tensor]:
        """Every differentiable input by name."""
        others = {f"others {name}": x for name, x in self.others.items() if x.is_floating_point()}
        found = {"x": self.x} | others | self.w
        if self.state is not None:
            found |= {f"memory {i}": memory for i, memory in enumerate(self.state.memory)}
            found |= tails(self.state)
        return found

    def tokens(self, start: int, end: int) -> Inputs:
        """Some of the tokens of every row, without a state."""
        others = {name: x[:, start:end] for name, x in self.others.items()}
        return dataclasses.replace(self, x=self.x[:, start:end], others=others, state=None)

    def mix(self, **changes: Any) -> tuple[Tensor, MixerState]:
        changes = {"state": self.state} | changes
        return self.mixer.mix(self.x, self.others, self.w, self.place, **changes)


def make(
    name: str,
    case: str | dict[str, Any] = "defaults",
    *,
    batch: int = 2,
    tokens: int = 48,
    runs: int | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Inputs:
    """Random inputs; with ``runs``, a state before the first token of that many runs."""
    given = options(name)[case] if isinstance(case, str) else case
    mixer = mixer_class(name)(mixer_class(name).Config(**SHAPE, **given))
    generator = torch.Generator().manual_seed(seed)
    exact = torch.promote_types(dtype, torch.float32)
    heads = mixer.cfg.num_heads

    def leaf(*shape: int, like: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
        x = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        return x.to(like).requires_grad_()

    w = {
        table.name: leaf(*table.shape, like=exact if table.keep_float32 else dtype, scale=0.5)
        for table in mixer.all_parameters()
    }
    state = None
    if runs is not None:
        # positive: linear attention divides by what it reads in one column
        memory = tuple(
            torch.rand(runs, heads, *shape, generator=generator, dtype=torch.float64).to(exact)
            for shape in mixer.memory_shapes()
        )
        conv = group_conv = length = None
        if mixer.conv_channels:
            channels = getattr(mixer, "num_copies", 1) * mixer.conv_channels  # of every memory of a mixture
            conv = leaf(runs, mixer.cfg.conv_size - 1, heads, channels)
        if mixer.group_conv_channels:
            group_conv = leaf(runs, mixer.cfg.conv_size - 1, mixer.num_groups, mixer.group_conv_channels)
        if mixer.uses_positions:
            length = torch.arange(runs) + 3
        memory = tuple(m.requires_grad_() for m in memory)
        state = MixerState(memory, conv, group_conv, length=length)
    x = leaf(batch, tokens, heads, mixer.fused_width)
    others = {p.name: leaf(batch, tokens, heads, p.width) for p in mixer.low_rank_projections()}
    if mixer.grouped_width:
        others["groups"] = leaf(batch, tokens, mixer.num_groups, mixer.grouped_width)
    if mixer.first_value is not None:
        width = {p.name: p.width for p in mixer.fused_projections()}[mixer.first_value]
        others[f"first_{mixer.first_value}"] = leaf(batch, tokens, heads, width)
    if mixer.uses_hidden:
        others["hidden"] = leaf(batch, tokens, mixer.cfg.hidden_size)
        scores = torch.rand(batch, tokens, mixer.cfg.num_memories, generator=generator, dtype=torch.float64)
        weight, others["memory_index"] = scores.topk(mixer.cfg.topk)
        others["memory_weight"] = weight.to(exact).requires_grad_()
    return Inputs(mixer, x, others, w, state)


def tails(state: MixerState) -> dict[str, Tensor]:
    """What a state remembers of the convolutions, by name."""
    found = {"conv": state.conv, "group conv": state.group_conv}
    return {name: x for name, x in found.items() if x is not None}


def outputs(result: tuple[Tensor, MixerState]) -> dict[str, Tensor]:
    """What :meth:`Mixer.mix` returned, by name."""
    o, state = result
    found = {"o": o} | {f"final memory {i}": memory for i, memory in enumerate(state.memory)}
    lengths = {} if state.length is None else {"final length": state.length}
    return found | {f"final {name}": x for name, x in tails(state).items()} | lengths


def gradients(found: dict[str, Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of every leaf, from the same random gradients of equally named outputs."""
    generator = torch.Generator().manual_seed(1)
    names = sorted(name for name in found if found[name].requires_grad)
    drawn = [torch.randn(found[n].shape, generator=generator, dtype=torch.float64) for n in names]
    drawn = [grad.to(found[n].dtype) for n, grad in zip(names, drawn)]
    outs, ins = [found[n] for n in names], list(leaves.values())
    grads = torch.autograd.grad(outs, ins, drawn, allow_unused=True, retain_graph=True)
    filled = [torch.zeros_like(x) if grad is None else grad for grad, x in zip(grads, leaves.values())]
    return {f"grad {name}": grad for name, grad in zip(leaves, filled)}


def error(found: Tensor, truth: Tensor) -> float:
    """Largest difference over the largest true value; NaN counts as infinite."""
    assert found.shape == truth.shape, (found.shape, truth.shape)
    if truth.numel() == 0:
        return 0.0
    difference = (found.double() - truth.double()).abs().max() / truth.double().abs().max().clamp(min=1e-30)
    return difference.nan_to_num(float("inf")).item()


def assert_close(found: dict[str, Tensor], truth: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert found.keys() == truth.keys()
    errors = {name: error(found[name], value) for name, value in truth.items()}
    assert all(e <= tolerance for e in errors.values()), errors
