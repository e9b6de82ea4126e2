"""A linear layer of an exported model: its mixer's projections, the recurrence, the output projection.

    hidden -> a linear map per projection of the mixer's table -> Mixer.mix -> o_proj -> hidden

Letters: B rows, T tokens, D hidden, H heads, G groups of heads, W fused width per head, V value dim.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from linear_moe.checkpoint.remote.model.cache import LinearMoeCache
from linear_moe.checkpoint.remote.model.configuration_linear_moe import LinearMoeConfig
from linear_moe.checkpoint.remote.model.padding import Padding
from linear_moe.lsm import get as mixer_class
from linear_moe.lsm.mixer import Mixer
from linear_moe.lsm.mom import MixtureOfMemories
from linear_moe.lsm.split import token_before
from linear_moe.lsm.tables import MixerState, Parameter, Placement, Projection

WAISTS = {None: nn.Identity, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}


class LowRank(nn.Module):
    """A projection through a narrow waist."""

    def __init__(self, hidden_size: int, table: Projection, num_heads: int) -> None:
        super().__init__()
        assert table.rank is not None
        self.down = nn.Linear(hidden_size, table.rank, bias=False)
        self.waist = WAISTS[table.waist]()
        self.up = nn.Linear(table.rank, num_heads * table.width, bias=table.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """``[B, T, D]`` to ``[B, T, H * width]``."""
        return self.up(self.waist(self.down(x_BTD)))


class Tables(nn.Module):
    """Parameters that all layers of a mixer share."""

    def __init__(self, mixer: Mixer) -> None:
        super().__init__()
        self.tables = [table for table in mixer.all_parameters() if table.per_model]
        _register(self, self.tables)

    def forward(self) -> dict[str, Tensor]:
        """By name."""
        return dict(self.named_parameters())


class LinearMoeMixer(nn.Module):
    """A mixer in the attention slot.

    Args:
        config: the model's.
        layer: index of the layer, from 0.
    """

    def __init__(self, config: LinearMoeConfig, layer: int) -> None:
        super().__init__()
        kinds = config.layer_kinds or []
        self.layer, self.kind = layer, kinds[layer]
        self.recurrence = build_mixer(config, self.kind)
        cfg = self.recurrence.cfg
        self.place = Placement(
            num_heads=cfg.num_heads,
            layer=layer,
            num_layers=len(kinds),
            layer_of_kind=kinds[:layer].count(self.kind),
        )
        groups = self.recurrence.num_groups
        for p in self.recurrence.fused_projections():
            self.add_module(p.name, nn.Linear(cfg.hidden_size, cfg.num_heads * p.width, bias=False))
        for p in self.recurrence.grouped_projections():
            self.add_module(p.name, nn.Linear(cfg.hidden_size, groups * p.width, bias=False))
        for p in self._low_rank:
            self.add_module(p.name, LowRank(cfg.hidden_size, p, cfg.num_heads))
        self.own_tables = [table for table in self.recurrence.all_parameters() if not table.per_model]
        _register(self, self.own_tables)
        self.o_proj = nn.Linear(cfg.num_heads * cfg.head_v_dim, cfg.hidden_size, bias=False)

    def forward(
        self,
        hidden_BTD: Tensor,
        tables: dict[str, Tensor],
        first_value: Tensor | None,
        padding: Padding | None = None,
        past_key_values: LinearMoeCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """``[B, T, D]`` to the same, and the first value (``Mixer.first_value``) for later layers of this mixer.

        Args:
            hidden_BTD: ``[B, T, D]``.
            tables: what all layers of the mixer share.
            first_value: what the first of them left, as it is packed; ``None`` in the first.
            padding: of the batch.
            past_key_values: has the state after earlier tokens, and gets the new one.
        """
        entry = None if past_key_values is None else past_key_values.mixer(self.layer)
        state = None if entry is None else entry.state
        columns = hidden_BTD.shape[1]
        x_BTD = hidden_BTD if padding is None else padding.pack(hidden_BTD)
        if x_BTD.shape[1] == 0:  # padding only
            out, new_state = torch.zeros_like(hidden_BTD), state
        else:
            cu_seqlens = None if padding is None else padding.cu_seqlens
            o_BTC, first_value, new_state = self._mix(x_BTD, tables, first_value, state, cu_seqlens)
            out = self.o_proj(o_BTC)
            out = out if padding is None else padding.unpack(out)
        if entry is not None:
            entry.store(new_state, columns)
        return out, first_value

    def _mix(
        self,
        x_BTD: Tensor,
        tables: dict[str, Tensor],
        first_value: Tensor | None,
        state: MixerState | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, MixerState]:
        mixer = self.recurrence
        w = {table.name: getattr(self, table.name) for table in self.own_tables} | tables
        x_BTHW, others, last_hidden = self._project(x_BTD, w, state, cu_seqlens)
        if mixer.first_value is not None:
            if self.place.layer_of_kind == 0:
                first_value = self._named(x_BTHW, mixer.first_value, w)
            else:
                assert first_value is not None, f"no earlier {self.kind} layer has run"
                others[f"first_{mixer.first_value}"] = first_value
        with torch.autocast(x_BTD.device.type, enabled=False):
            x_BTHW = self._as_weights(x_BTHW)
            others = {name: self._as_weights(x) for name, x in others.items()}
            o_BTHV, new_state = mixer.mix(x_BTHW, others, w, self.place, state=state, cu_seqlens=cu_seqlens)
        return o_BTHV.flatten(2), first_value, dataclasses.replace(new_state, hidden=last_hidden)

    def _as_weights(self, x: Tensor) -> Tensor:
        """Not narrower than the weights, where autocast has made it so: a mixer gets all of one dtype."""
        dtype = self.o_proj.weight.dtype
        return x.to(torch.promote_types(x.dtype, dtype)) if x.is_floating_point() else x

    def _project(
        self, x_BTD: Tensor, w: dict[str, Tensor], state: MixerState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """``[B, T, H, W]``, the other projections by name, and the layer's last input for a token shift."""
        mixer, heads = self.recurrence, self.place.num_heads
        last_hidden, inputs = None, {}
        if mixer.token_shift:
            before_BTD, last_hidden = token_before(x_BTD, state, cu_seqlens)
            with torch.autocast(x_BTD.device.type, enabled=False):
                inputs = mixer.inputs(x_BTD, before_BTD, w)

        def projected(p: Projection, parts: int) -> Tensor:
            out: Tensor = getattr(self, p.name)(inputs.get(p.name, x_BTD))
            return out.unflatten(-1, (parts, p.width))

        x_BTHW = torch.cat([projected(p, heads) for p in mixer.fused_projections()], dim=-1)
        others = {p.name: projected(p, heads) for p in self._low_rank}
        if grouped := mixer.grouped_projections():
            others["groups"] = torch.cat([projected(p, mixer.num_groups) for p in grouped], dim=-1)
        if isinstance(mixer, MixtureOfMemories):
            with torch.autocast(x_BTD.device.type, enabled=False):
                _, weight_BTk, index_BTk = mixer.route(x_BTD, w)
            others |= {"hidden": x_BTD, "memory_weight": weight_BTk, "memory_index": index_BTk}
        return x_BTHW, others, last_hidden

    @property
    def _low_rank(self) -> tuple[Projection, ...]:
        return self.recurrence.low_rank_projections(self.place.layer_of_kind)

    def _named(self, x_BTHW: Tensor, name: str, w: dict[str, Tensor]) -> Tensor:
        """One of the fused projections."""
        table = self.recurrence.fused_projections()
        parts = dict(
            zip([p.name for p in table], x_BTHW.split([p.width for p in table], dim=-1), strict=True)
        )
        bias = w.get(f"{name}_bias")
        return parts[name] if bias is None else parts[name] + bias

    @torch.no_grad()
    def initialize(self, std: float) -> None:
        """New weights as training starts them, after the linear maps have theirs."""
        _fill(self, self.own_tables, std)
        cfg = self.recurrence.cfg
        found: dict[str, Tensor] = dict(self.named_parameters(recurse=False))
        for p in self.recurrence.fused_projections():
            found[f"in_proj.{p.name}"] = getattr(self, p.name).weight.data.unflatten(0, (cfg.num_heads, -1))
        for p in self._low_rank:
            module = getattr(self, p.name)
            found[f"low_rank.{p.name}.down"] = module.down.weight
            found |= {f"low_rank.{p.name}.up.{name}": x for name, x in module.up.named_parameters()}
        found["out_proj.weight"] = self.o_proj.weight
        self.recurrence.initialize(found, self.place)


def build_mixer(config: LinearMoeConfig, kind: str) -> Mixer:
    """The mixer of that name in this model; ``ValueError`` for an unknown one or impossible options."""
    found = mixer_class(kind)
    return found(found.Config(**(config.mixers or {})[kind]))


def float32_names(config: LinearMoeConfig) -> set[str]:
    """Patterns of the parameters that stay float32 in a half-precision model."""
    names = set()
    for kind in sorted(set(config.layer_kinds or []) & set(config.mixers or {})):
        for table in build_mixer(config, kind).all_parameters():
            if table.keep_float32:
                names.add(rf"\.{f'tables.{kind}' if table.per_model else 'mixer'}\.{table.name}$")
    return names


def initialize_tables(module: Tables, std: float) -> None:
    """New values of what the layers share."""
    _fill(module, module.tables, std)


def _register(module: nn.Module, tables: list[Parameter]) -> None:
    for table in tables:
        module.register_parameter(table.name, nn.Parameter(torch.empty(table.shape)))


@torch.no_grad()
def _fill(module: nn.Module, tables: list[Parameter], std: float) -> None:
    for table in tables:
        parameter: Any = getattr(module, table.name)
        if table.init is None:
            parameter.normal_(0.0, std)
        else:
            table.init(parameter)
