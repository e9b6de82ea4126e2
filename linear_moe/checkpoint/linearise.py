"""A mixer layer that starts from a softmax layer: projections carried over, everything else started neutral.

    q, k, v, o          carried; keys and values of grouped-query attention are repeated for every query head
    short convolution   passes each token through: weight 1 on it, 0 on those before
    gates               zero weights: the same for every token, half open; what they do then is set by their biases,
                        which start as in a training from scratch (slow decay)
    output norm         half the size that values have, sqrt(mean (W_v diag(norm))^2): attention gives averages of them;
                        times two where there is a half-open gate

The rest (decay rates, token shift, routers) starts as in a training from scratch.

Letters: H heads of the mixer, C channels of a softmax head, G key/value groups, W width of a projection, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from linear_moe import lsm
from linear_moe.checkpoint.blueprint import Blueprint
from linear_moe.checkpoint.hf_folder import Stored
from linear_moe.checkpoint.origins import Origin
from linear_moe.checkpoint.tables import Row
from linear_moe.checkpoint.torch_dist import Piece
from linear_moe.lsm import Mixer, Projection
from linear_moe.lsm.mom import MixtureOfMemories
from linear_moe.model.config import mixer_config
from linear_moe.model.mixer_layer import MixerLayer
from linear_moe.model.mixer_parameters import ModelTables
from linear_moe.model.pattern import SOFTMAX

ROLES = {"q": 0, "k": 1, "v": 2, "c": 0, "b": 1, "x": 2, "i": 2}
"""Which of query, key and value a projection continues, by its name; only where it has as many channels (``b`` of the
delta rule, a write strength, has not)."""

GATE_OPEN = 0.5
"""A sigmoid gate with zero weights."""

AVERAGED = 0.5
"""Size of an average of values, as attention gives it, over that of a value. Measured: of 0.4, 0.7 and 1 the lower ones
gave the lower loss before training (docs/checkpoints.md)."""


def start_layer(
    model: Blueprint,
    layer: int,
    softmax: Mapping[str, Row],
    stored: Mapping[str, Stored],
    origins: dict[str, Origin],
) -> list[Piece]:
    """The pieces of one mixer layer's tensors, made when they are written.

    Args:
        model: the model to make.
        layer: from 0.
        softmax: rows of the source by our key, as if every layer were softmax.
        stored: tensors of the source.
        origins: gets where each tensor came from.
    """
    prefix = f"decoder.layers.{layer}.self_attention."
    keys = [key for key in model.tensors if key.startswith(prefix)]
    source = _Source(softmax, stored, prefix)
    start = _Started(model, layer, source, {key.removeprefix(prefix) for key in keys})
    pieces = []
    for key in keys:
        name = key.removeprefix(prefix)
        Origin.note(origins, key, *start.origin(name))
        dtype = torch.float32 if key in model.float32 else model.args.params_dtype
        shape = model.tensors[key]
        zeros = (0,) * len(shape)
        pieces.append(Piece(key, shape, zeros, shape, dtype, _maker(start, name, shape, dtype)))
    return pieces


def start_tables(model: Blueprint, kinds: set[str], origins: dict[str, Origin]) -> list[Piece]:
    """The pieces of what all layers of each of ``kinds`` share, as a training from scratch starts it."""
    pieces = []
    groups = ProcessGroupCollection.use_mpu_process_groups()
    for kind in sorted(kinds - {SOFTMAX}):
        mixer = lsm.get(kind)(mixer_config(kind, model.config.transformer))
        shared = [table for table in mixer.all_parameters() if table.per_model]
        if not shared:
            continue
        tables = ModelTables(model.config.transformer, shared, groups).to(model.args.params_dtype)
        for name, tensor in tables.named_parameters():
            key = f"{kind}_tables.{name}"
            data, shape = tensor.detach(), tuple(tensor.shape)
            Origin.note(origins, key, "started", f"as {kind} from scratch")
            pieces.append(Piece(key, shape, (0,) * len(shape), shape, data.dtype, partial(torch.clone, data)))
    return pieces


def _maker(start: _Started, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Callable[[], Tensor]:
    return lambda: start.tensor(name).to(dtype).reshape(shape)


@dataclass(frozen=True)
class _Source:
    """The softmax layer that was."""

    rows: Mapping[str, Row]
    stored: Mapping[str, Stored]
    prefix: str

    def names(self, part: str) -> tuple[str, ...]:
        """Hugging Face's names of q, k and v (``linear_qkv.weight``), or of the output projection; none in others."""
        row = self.rows.get(self.prefix + part)
        return () if row is None else row.names

    def read(self, name: str) -> Tensor:
        """A tensor of the source."""
        return self.stored[name].read(name)

    def norm(self) -> Tensor:
        """Weight of the norm before the layer, ``[D]``."""
        (name,) = self.rows[self.prefix.replace("self_attention.", "input_layernorm.weight")].names
        return self.read(name)


class _Started:
    """The tensors of one mixer layer, by name."""

    def __init__(self, model: Blueprint, layer: int, source: _Source, names: set[str]) -> None:
        self.model, self.layer, self.source, self.names = model, layer, source, names
        self.kind = model.kinds[layer]
        config = model.config.transformer
        self.mixer: Mixer = lsm.get(self.kind)(mixer_config(self.kind, config))
        assert config.kv_channels is not None
        self.heads, self.channels = config.num_attention_heads, config.kv_channels
        self.fresh: dict[str, Tensor] | None = None
        self.asked: set[str] = set()

    def origin(self, name: str) -> tuple[str, str]:
        """``carried`` or ``started``, and from what."""
        table = {p.name: p for p in self.mixer.all_projections()}
        if name in ("in_proj.weight", "group_proj.weight", "memory_weight"):
            parts = self._parts(name)
            carried = [f"{p.name} = {self._carried(p)}" for p in parts if self._carried(p)]
            rest = [p for p in parts if not self._carried(p)]
            neutral = ", ".join(p.name for p in rest if _is_gate(p))
            random = ", ".join(p.name for p in rest if not _is_gate(p))
            texts = [*carried, neutral and f"{neutral} = 0", random and f"{random} random"]
            return ("carried" if carried else "started"), "; ".join(filter(None, texts))
        if name == "out_proj.weight":
            names = self._output()
            return ("carried", names[0]) if names else ("started", "random: another width")
        if (
            name.endswith("_bias")
            and (p := table.get(name.removesuffix("_bias")))
            and self._carried(p, "bias")
        ):
            return "carried", self._carried(p, "bias")
        if name in ("conv_weight", "group_conv_weight"):
            return "started", "each token through"
        if name == "norm_weight" and self._values():
            return "started", f"half the size of the values of {self._values()}"
        if _is_low_rank_gate(name):
            return "started", "0: the same gate for every token"
        return "started", f"as {self.kind} from scratch"

    def tensor(self, name: str) -> Tensor:
        """One of them, as it starts."""
        tensor = self._fresh()[name].clone()
        self.asked.add(name)
        if self.asked == self.names:
            self.fresh = None
        if name in ("in_proj.weight", "group_proj.weight", "memory_weight"):
            self._fill_projections(tensor, self._parts(name))
        elif name == "out_proj.weight" and (names := self._output()):
            tensor.copy_(self.source.read(names[0]))
        elif name in ("conv_weight", "group_conv_weight"):
            tensor.zero_()
            tensor[..., -1] = 1
        elif name == "norm_weight" and (value := self._values()):
            tensor.fill_(self._size_of_values(value))
        elif _is_low_rank_gate(name):
            tensor.zero_()
        elif name.endswith("_bias"):
            table = {f"{p.name}_bias": p for p in self.mixer.fused_projections()}
            if name in table and (source := self._carried(table[name], "bias")):
                tensor.copy_(self._repeated(self.source.read(source)).reshape(tensor.shape))
        return tensor

    def _fresh(self) -> dict[str, Tensor]:
        """The tensors as a training from scratch starts them; kept until all of them have been asked for."""
        if self.fresh is None:
            groups = ProcessGroupCollection.use_mpu_process_groups()
            number, config = self.layer + 1, copy(self.model.config.transformer)
            config.perform_initialization = True  # a blueprint has no weights
            module = MixerLayer(config, layer_number=number, mixer=self.kind, pg_collection=groups)
            self.fresh = {name: parameter.detach() for name, parameter in module.named_parameters()}
        return self.fresh

    # ---- projections ----

    def _parts(self, name: str) -> tuple[Projection, ...]:
        if name == "group_proj.weight":
            return self.mixer.grouped_projections()
        if name == "memory_weight":
            assert isinstance(self.mixer, MixtureOfMemories)
            return tuple(p for p in self.mixer._own if p.rank is None)
        return self.mixer.fused_projections()

    def _carried(self, p: Projection, part: str = "weight") -> str:
        """Name of the source's tensor that a projection continues; empty: none."""
        names = self.source.names(f"linear_qkv.{part}")
        if not names or p.name not in ROLES or p.rank is not None:
            return ""
        heads = self.mixer.num_groups if p.grouped else self.mixer.cfg.num_heads
        return names[ROLES[p.name]] if heads * p.width == self.heads * self.channels else ""

    def _fill_projections(self, tensor: Tensor, parts: tuple[Projection, ...]) -> None:
        """Carried parts, zeros in gates; all memories of a mixture start alike where they are carried."""
        width = sum(p.width for p in parts)
        by_head = tensor.view(-1, width, tensor.shape[-1])  # [memories * heads, W, D]
        first = 0
        for p in parts:
            piece = by_head[:, first : first + p.width]
            source = self._carried(p)
            if source:
                rows = self._repeated(self.source.read(source)).unflatten(0, (-1, p.width))
                piece.copy_(rows.repeat(piece.shape[0] // rows.shape[0], 1, 1))
            elif _is_gate(p):
                piece.zero_()
            first += p.width

    def _repeated(self, x: Tensor) -> Tensor:
        """``[G * C, ..]`` to ``[H * C, ..]``: the group's channels for each of its query heads."""
        groups = x.shape[0] // self.channels
        by_group = x.unflatten(0, (groups, self.channels))
        return by_group.repeat_interleave(self.heads // groups, dim=0).flatten(0, 1)

    def _output(self) -> tuple[str, ...]:
        names = self.source.names("linear_proj.weight")
        cfg = self.mixer.cfg
        fits = names and self.source.stored[names[0]].shape[1] == cfg.num_heads * cfg.head_v_dim
        return names if fits else ()

    # ---- norm and gates ----

    def _values(self) -> str:
        found = [self._carried(p) for p in self.mixer.all_projections() if ROLES.get(p.name) == 2]
        return found[0] if found else ""

    def _size_of_values(self, name: str) -> float:
        weight = self.source.read(name).float() * self.source.norm().float()
        size = weight.square().sum(1).mean().sqrt().item()
        is_gated = any(p.name == "g" for p in self.mixer.all_projections())
        return AVERAGED * size / (GATE_OPEN if is_gated else 1.0)


def _is_gate(p: Projection) -> bool:
    """Whether a projection starts at zero: the output gate, and those of one channel (decay, write strength, step).

    Others that nothing is carried to stay random: slots (gsa) that start alike would stay alike.
    """
    return p.name == "g" or p.width == 1


def _is_low_rank_gate(name: str) -> bool:
    """Whether a tensor is the last map of a low-rank gate, or those of all memories."""
    return name.endswith((".up.weight", "_up")) and name.startswith(("low_rank.", "memory_"))
