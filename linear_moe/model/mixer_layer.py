"""A mixer as the ``self_attention`` of a Megatron ``TransformerLayer``: projections, parallelism, packing, decoding.

    hidden -> one fused column-parallel GEMM (+ low-rank gates ..) -> Mixer.mix -> row-parallel GEMM -> hidden

The fused weight is laid out head by head ([q k v .. of head 0][q k v .. of head 1] ..), so a tensor-parallel shard is a
contiguous slice of it: checkpoints reshard like any column-parallel weight, and every projection is a strided view of
the GEMM's output. Context parallelism hands the mixer the memory before its tokens (LASP-2) and the tail of the left
neighbour (short convolution, token shift).

Letters: T local tokens, B batch, D hidden, H heads here, W fused width per head, V value dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import Tensor

from linear_moe import lsm
from linear_moe.lsm import Mixer, MixerState, Placement
from linear_moe.lsm.mom import MixtureOfMemories
from linear_moe.lsm.split import token_before
from linear_moe.model.config import LinearMoEConfig, mixer_config
from linear_moe.model.decoding import DecodingContext
from linear_moe.model.memory_balance import MemoryBalance
from linear_moe.model.mixer_parameters import ModelTables, TableModule
from linear_moe.model.mixer_projections import GroupLinear, LowRankLinear, shifted, wait_for, whole_sequence
from linear_moe.model.sequence import layout_of, padding_of
from linear_moe.parallel.halo import lengths_before, tokens_before
from linear_moe.parallel.lasp2 import initial_states
from linear_moe.parallel.layout import SequenceLayout


@dataclass
class FirstValue:
    """What the first layer of a mixer hands to the later ones of the same micro-batch (``Mixer.first_value``)."""

    x_BTHV: Tensor | None = None

    def message(self, hidden_tBD: Tensor) -> Tensor:
        """The value cut like hidden states, ``[t, B, ...]``: any order of its elements will do on the way."""
        return self.take(keep=False).reshape(*hidden_tBD.shape[:2], -1).to(hidden_tBD.dtype)

    def take(self, keep: bool) -> Tensor:
        """The value; unless it is kept, neither it nor the graph behind it outlives this step."""
        assert self.x_BTHV is not None, "no earlier layer of this mixer has run"
        taken = self.x_BTHV
        if not keep:
            self.x_BTHV = None
        return taken

    def receive(self, message_tBX: Tensor, shape_HV: tuple[int, int], dtype: torch.dtype) -> None:
        """The inverse of :meth:`message`, in the dtype of the projections: a residual stream may be wider."""
        self.x_BTHV = message_tBX.reshape(message_tBX.shape[1], -1, *shape_HV).to(dtype)


class MixerLayer(TableModule):
    """A token mixer in Megatron's attention slot.

    Args:
        config: the model's config.
        submodules: unused, for Megatron's ``build_module``.
        layer_number: global, from 1.
        mixer: registered name of the mixer.
        attn_mask_type: unused; a mixer is always causal.
        cp_comm_type: unused; context parallelism is LASP-2.
        pg_collection: process groups; ``tp`` and ``cp`` are used.
        pp_layer_offset: unused.
        name: unused.
    """

    def __init__(
        self,
        config: LinearMoEConfig,
        submodules: object = None,
        layer_number: int = 1,
        *,
        mixer: str,
        attn_mask_type: AttnMaskType | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        pp_layer_offset: int | None = None,
        name: str | None = None,
    ) -> None:
        assert pg_collection is not None
        super().__init__(config, pg_collection)
        self.layer_number = layer_number
        self.cp_group = pg_collection.cp
        self.mixer: Mixer = lsm.get(mixer)(mixer_config(mixer, config))
        cfg, tp = self.mixer.cfg, self.tp_group.size()
        assert cfg.num_heads % tp == 0, f"{cfg.num_heads} heads on {tp} tensor-parallel ranks"
        self.place = Placement(
            num_heads=cfg.num_heads // tp,
            first_head=self.tp_group.rank() * (cfg.num_heads // tp),
            layer=layer_number - 1,
            num_layers=config.num_layers,
            layer_of_kind=config.layer_kinds[: layer_number - 1].count(mixer),
            sum_over_ranks=self._sum_over_ranks,
        )
        self._add_projections(config, pg_collection)
        self._add_parameters(config, pg_collection)
        self.first_value = FirstValue()
        self.balance: MemoryBalance | None = None
        if isinstance(self.mixer, MixtureOfMemories):
            mixture = self.mixer.cfg
            self.balance = MemoryBalance(
                config, self.place.layer, mixture.num_memories, mixture.aux_loss_coeff, pg_collection
            )
        self.out_proj = RowParallelLinear(
            cfg.num_heads * cfg.head_v_dim,
            config.hidden_size,
            config=config,
            init_method=cast(Any, config.output_layer_init_method),
            bias=config.add_bias_linear,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=self.tp_group,
        )
        with torch.no_grad(), tensor_parallel.get_cuda_rng_tracker().fork():
            self.mixer.initialize(self._found(), self.place)

    def _add_projections(self, config: LinearMoEConfig, groups: ProcessGroupCollection) -> None:
        heads = self.mixer.cfg.num_heads
        table = self.mixer.fused_projections()
        is_plain = self.tp_group.size() == 1 and not config.gradient_accumulation_fusion
        self.biases_of_gemm: list[str] = []
        """Biases that the GEMM adds: elsewhere they are an operation over all tokens, and another before it."""
        if is_plain or self.mixer.token_shift:
            self.biases_of_gemm = [f"{p.name}_bias" for p in table if p.bias]
        self.in_proj = ColumnParallelLinear(
            config.hidden_size,
            heads * self.mixer.fused_width,
            config=config,
            init_method=config.init_method,
            bias=False,
            gather_output=False,
            tp_group=self.tp_group,
        )
        self.no_bias: Tensor
        if self.biases_of_gemm:
            # What the other channels get; made once, and in no checkpoint.
            widest = max((p.width for p in table if not p.bias), default=0)
            zeros = self.in_proj.weight.detach().new_zeros(self.place.num_heads, widest)
            self.register_buffer("no_bias", zeros, persistent=False)
        low_rank = self.mixer.low_rank_projections(self.place.layer_of_kind)
        self.low_rank = torch.nn.ModuleDict(
            {p.name: LowRankLinear(config, p, heads, groups) for p in low_rank}
        )
        self.group_proj: GroupLinear | None = None
        if self.mixer.grouped_width:
            width = self.mixer.num_groups * self.mixer.grouped_width
            self.group_proj = GroupLinear(config, width, groups)

    def _add_parameters(self, config: LinearMoEConfig, groups: ProcessGroupCollection) -> None:
        tables = self.mixer.all_parameters()
        self.create([table for table in tables if not table.per_model])
        self.model_tables: ModelTables | None = None
        if shared := [table for table in tables if table.per_model]:
            # On its own; the builder gives all layers of a model the same.
            self.model_tables = ModelTables(config, shared, groups)

    def _found(self) -> dict[str, Tensor]:
        """This layer's parameters by checkpoint key, and the parts of the fused one."""
        table = self.mixer.fused_projections()
        weight_HWD = self.in_proj.weight.unflatten(0, (self.place.num_heads, -1))
        parts = zip(table, weight_HWD.split([p.width for p in table], dim=1), strict=True)
        return dict(self.named_parameters()) | {f"in_proj.{p.name}": part for p, part in parts}

    def share(self, tables: ModelTables | None, first_value: FirstValue) -> None:
        """Use what the layers of one model share instead of this layer's own."""
        if self.model_tables is not None:
            assert tables is not None
            del self.model_tables
            # Not a submodule: the model owns it, and saves it once.
            self.__dict__["model_tables"] = tables
        self.first_value = first_value

    def weights(self) -> dict[str, Tensor]:
        """The mixer's parameters by name, those of the whole model included, less biases that the GEMM has added."""
        shared = {} if self.model_tables is None else self.model_tables()
        found = super().weights() | shared
        return {name: weight for name, weight in found.items() if name not in self.biases_of_gemm}

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        inference_context: Any = None,
        rotary_pos_emb: Any = None,
        rotary_pos_cos: Tensor | None = None,
        rotary_pos_sin: Tensor | None = None,
        rotary_pos_cos_sin: Tensor | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        sequence_len_offset: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """``[T, B, D]`` to ``[T, B, D]`` and the bias that the caller adds (Megatron's contract)."""
        length, batch = hidden_states.shape[:2]
        if self.config.sequence_parallel:
            length *= self.tp_group.size()
        layout = layout_of(packed_seq_params, batch=batch, local_length=length, cp_group=self.cp_group)
        state = None
        if self.balance is not None:
            self.balance.padding_BT = padding_of(packed_seq_params)
        if inference_context is not None:
            state = self._state(layout, inference_context)
        weights = self.weights()
        x_BTHW, others, last_hidden = self._project(hidden_states, layout, weights, state)
        if inference_context is not None:
            cu_seqlens = layout.run_cu_seqlens
            o_BTHV, state = self.mixer.mix(
                x_BTHW, others, weights, self.place, state=state, cu_seqlens=cu_seqlens
            )
            state = replace(state, hidden=last_hidden)
            if isinstance(inference_context, DecodingContext):
                inference_context.keep(self.layer_number, state)
            else:
                inference_context.key_value_memory_dict[self.layer_number] = state
        elif self.config.lsm_recompute and self.training:
            mix = partial(self._mix, layout, tuple(others))
            o_BTHV = tensor_parallel.checkpoint(mix, False, x_BTHW, *others.values())
        else:
            o_BTHV = self._mix(layout, tuple(others), x_BTHW, *others.values())
        o_TBC = o_BTHV.transpose(0, 1).flatten(2)
        return self.out_proj(o_TBC)

    # ---- projections ----

    def _project(
        self, hidden_TBD: Tensor, layout: SequenceLayout, w: dict[str, Tensor], state: MixerState | None
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """``[B, T, H, W]``, the other projections by name, and the layer's last input for a token shift."""
        last_hidden = None
        if self.mixer.token_shift:
            hidden_BTD = self._whole(hidden_TBD)
            before_BTD, last_hidden = self._before(hidden_BTD, layout, state)
            inputs = self.mixer.inputs(hidden_BTD, before_BTD, w)
            table, heads = self.mixer.fused_projections(), self.place.num_heads
            biases = {p.name: getattr(self, f"{p.name}_bias") for p in table if p.bias}
            wait_for(self.in_proj)
            parts = shifted(table, self.in_proj.weight, biases, inputs, heads)
            sum_here = self.tp_group.size() > 1 and not self.config.sequence_parallel
            others = {
                name: cast(LowRankLinear, module).of_whole(inputs[name], sum_here).unflatten(-1, (heads, -1))
                for name, module in self.low_rank.items()
            }
            if self.mixer.conv_channels:
                x_BTHW = torch.cat(list(parts.values()), dim=-1)
            else:  # nothing reads them side by side
                x_BTHW, others = hidden_BTD.new_empty(*hidden_BTD.shape[:2], heads, 0), others | parts
        else:
            x_BTHW = self._heads(self._fused(hidden_TBD))
            others = {name: self._heads(module(hidden_TBD)) for name, module in self.low_rank.items()}
        if self.group_proj is not None:
            groups_BTGW = self._heads(self.group_proj(hidden_TBD), self.mixer.num_groups)
            others["groups"] = groups_BTGW[:, :, self.mixer.groups_here(self.place)]
        if isinstance(self.mixer, MixtureOfMemories):
            others |= self._routed(self.mixer, self._whole(hidden_TBD), w)
        if self.mixer.first_value is not None:
            layers = self.mixer.cfg.layers_of_kind
            if self.place.layer_of_kind > 0:
                name = f"first_{self.mixer.first_value}"
                others[name] = self.first_value.take(keep=self.place.layer_of_kind < layers - 1)
            elif layers > 1:
                self.first_value.x_BTHV = self._named(x_BTHW, others, self.mixer.first_value, w)
        return x_BTHW, others, last_hidden

    def _fused(self, hidden_TBD: Tensor) -> Tensor:
        """``[T, B, D]`` to ``[T, B, H * W]``."""
        if not self.biases_of_gemm:
            out: Tensor = self.in_proj(hidden_TBD)[0]
            return out
        wait_for(self.in_proj)
        biases = [
            getattr(self, f"{p.name}_bias") if p.bias else self.no_bias[:, : p.width]
            for p in self.mixer.fused_projections()
        ]
        weight = self.in_proj.weight
        return F.linear(hidden_TBD, weight, torch.cat(biases, dim=1).flatten().to(weight.dtype))

    def _heads(self, x_TBC: Tensor, num_heads: int | None = None) -> Tensor:
        """``[T, B, H * width]`` to ``[B, T, H, width]``, a view."""
        return x_TBC.unflatten(2, (num_heads or self.place.num_heads, -1)).transpose(0, 1)

    def _whole(self, hidden_TBD: Tensor) -> Tensor:
        """All local tokens on every tensor-parallel rank, ``[B, T, D]``."""
        return whole_sequence(hidden_TBD, self.config, self.tp_group).transpose(0, 1)

    def _routed(
        self, mixer: MixtureOfMemories, hidden_BTD: Tensor, w: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The input of a mixture's memories and which of them each token chose."""
        probs_BTE, weight_BTk, index_BTk = mixer.route(hidden_BTD, w)
        if self.training and self.balance is not None:
            weight_BTk = self.balance.attach(weight_BTk, probs_BTE, index_BTk)
        return {"hidden": hidden_BTD, "memory_weight": weight_BTk, "memory_index": index_BTk}

    def _named(self, x_BTHW: Tensor, others: dict[str, Tensor], name: str, w: dict[str, Tensor]) -> Tensor:
        """One of the fused projections, biased."""
        if name in others:
            return others[name]
        table = self.mixer.fused_projections()
        parts = x_BTHW.split([p.width for p in table], dim=-1)
        part = parts[[p.name for p in table].index(name)]
        return part + w[f"{name}_bias"] if f"{name}_bias" in w else part

    def _before(
        self, hidden_BTD: Tensor, layout: SequenceLayout, state: MixerState | None
    ) -> tuple[Tensor, Tensor]:
        """The token before each one, ``[B, T, D]``, and the last one of every run."""
        if layout.cp_size > 1:
            state = MixerState((), hidden=tokens_before(hidden_BTD, 1, layout, self.cp_group))
        before, last_hidden = token_before(layout.runs(hidden_BTD), state, layout.run_cu_seqlens)
        return layout.tokens(before), last_hidden

    # ---- mixing ----

    def _mix(self, layout: SequenceLayout, names: tuple[str, ...], x_BTHW: Tensor, *others: Tensor) -> Tensor:
        """The mixer over this rank's runs, started from the memory that earlier ranks leave."""
        weights = self.weights()
        named = dict(zip(names, others, strict=True))
        state, memory_from = None, None
        if layout.cp_size > 1:
            memory_from = partial(initial_states, layout=layout, group=self.cp_group)
            state = self._state_before(layout, x_BTHW, named, weights)
        o, _ = self.mixer.mix(
            layout.runs(x_BTHW),
            {name: layout.runs(x) for name, x in named.items()},
            weights,
            self.place,
            state=state,
            memory_from=memory_from,
            cu_seqlens=layout.run_cu_seqlens,
        )
        return layout.tokens(o)

    def _state_before(
        self, layout: SequenceLayout, x_BTHW: Tensor, others: dict[str, Tensor], w: dict[str, Tensor]
    ) -> MixerState:
        """What the tokens on other ranks leave for this rank's runs, except the memory."""
        mixer, reach = self.mixer, self.mixer.cfg.conv_size - 1
        conv = group_conv = length = None
        if mixer.conv_channels and not mixer.uses_hidden:
            conv = tokens_before(mixer.conv_input(x_BTHW, w), reach, layout, self.cp_group)
        if mixer.group_conv_channels:
            convolved = others["groups"][..., : mixer.group_conv_channels]
            group_conv = tokens_before(convolved, reach, layout, self.cp_group)
        if mixer.uses_positions:
            length = lengths_before(layout, x_BTHW.device)
        return MixerState((), conv, group_conv, length=length)

    def _state(self, layout: SequenceLayout, inference_context: Any) -> MixerState | None:
        """Where decoding left off, kept where Megatron keeps keys and values."""
        one_document = isinstance(inference_context, DecodingContext) or not layout.is_packed
        if layout.cp_size > 1 or not one_document or not inference_context.is_static_batching():
            raise ValueError(
                "a mixer decodes with static batching, without context parallelism or packed documents\n"
                "  why: its state is one matrix per sequence and layer\n"
                "  try: a StaticInferenceContext on a model built with context parallel size 1; rows of different "
                "length: linear_moe.inference.Decoder"
            )
        state: MixerState | None = inference_context.key_value_memory_dict.get(self.layer_number)
        return state

    def _sum_over_ranks(self, x: Tensor) -> Tensor:
        """Over tensor-parallel ranks, forward and backward."""
        total = reduce_from_tensor_model_parallel_region(x, group=self.tp_group)
        return copy_to_tensor_model_parallel_region(total, group=self.tp_group)

    # ---- checkpoints ----

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Per-head parameters are sharded on axis 0; everything else as Megatron does."""
        sharded = self.sharded_tables(prefix, sharded_offsets, metadata)
        children: dict[str, Any] = {"in_proj": self.in_proj, "out_proj": self.out_proj}
        children |= {f"low_rank.{name}": module for name, module in self.low_rank.items()}
        optional = {name: self._modules.get(name) for name in ("group_proj", "model_tables")}
        children |= {name: module for name, module in optional.items() if module is not None}
        for name, module in children.items():
            sharded |= sharded_state_dict_default(
                module, f"{prefix}{name}.", sharded_offsets, metadata, self.tp_group
            )
        return sharded

    def backward_dw(self) -> None:
        """Nothing is delayed: weight gradients are computed with the others."""
