"""A mixer as the ``self_attention`` of a Megatron ``TransformerLayer``: projections, parallelism, packing, decoding.

    hidden -> one fused column-parallel GEMM (+ low-rank gates) -> Mixer.mix -> row-parallel GEMM -> hidden

The fused weight is laid out head by head ([q k v .. of head 0][q k v .. of head 1] ..), so a tensor-parallel shard is a
contiguous slice of it: checkpoints reshard like any column-parallel weight, and every projection is a strided view of
the GEMM's output. Per-head parameters are sharded with the heads; parameters that all heads share are replicated, and
their gradients summed over tensor-parallel ranks, with and without sequence parallelism. Context parallelism hands the
mixer the memory before its tokens (LASP-2) and the tail of the left neighbour (short convolution).

Letters: T local tokens, B batch, D hidden, H heads here, W fused width per head, V value dim.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)
from torch import Tensor

from linear_moe import lsm
from linear_moe.lsm import Mixer, MixerState, Parameter, Placement
from linear_moe.model.config import LinearMoEConfig, mixer_config
from linear_moe.model.sequence import layout_of
from linear_moe.parallel.halo import tokens_before
from linear_moe.parallel.lasp2 import initial_states
from linear_moe.parallel.layout import SequenceLayout


class LowRankLinear(MegatronModule):
    """hidden -> ``rank`` channels, replicated -> heads, column-parallel: a gate through a narrow waist."""

    def __init__(
        self,
        config: LinearMoEConfig,
        rank: int,
        out_features: int,
        bias: bool,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config)
        # Replicated, and fed a slice of the sequence under sequence parallelism: Megatron sums such gradients.
        self.down = _empty((rank, config.hidden_size), config.params_dtype)
        config.init_method(self.down.data)
        setattr(self.down, "sequence_parallel", config.sequence_parallel)  # noqa: B010
        self.up = ColumnParallelLinear(
            rank,
            out_features,
            config=config,
            init_method=config.init_method,
            bias=bias,
            gather_output=False,
            tp_group=pg_collection.tp,
        )

    def forward(self, hidden_TBD: Tensor) -> Tensor:
        """``[T, B, D]`` (``T / TP`` under sequence parallelism) to ``[T, B, out_features / TP]``."""
        out, _ = self.up(F.linear(hidden_TBD, self.down.to(hidden_TBD.dtype)))
        return out


class MixerLayer(MegatronModule):
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
        super().__init__(config)
        assert pg_collection is not None
        self.layer_number = layer_number
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        self.mixer: Mixer = lsm.get(mixer)(mixer_config(mixer, config))
        cfg = self.mixer.cfg
        tp = self.tp_group.size()
        assert cfg.num_heads % tp == 0, f"{cfg.num_heads} heads on {tp} tensor-parallel ranks"
        self.place = Placement(
            num_heads=cfg.num_heads // tp,
            first_head=self.tp_group.rank() * (cfg.num_heads // tp),
            layer=layer_number - 1,
            num_layers=config.num_layers,
        )
        column = partial(
            ColumnParallelLinear,
            config=config,
            init_method=config.init_method,
            bias=False,
            gather_output=False,
            tp_group=self.tp_group,
        )
        self.in_proj = column(config.hidden_size, cfg.num_heads * self.mixer.fused_width)
        self.low_rank = torch.nn.ModuleDict(
            {
                p.name: LowRankLinear(
                    config, cast(int, p.rank), cfg.num_heads * p.width, p.bias, pg_collection
                )
                for p in self.mixer.low_rank_projections()
            }
        )
        for parameter in self.mixer.all_parameters():
            self.register_parameter(parameter.name, self._create(parameter))
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

    def _create(self, table: Parameter) -> torch.nn.Parameter:
        shape = (self.place.num_heads, *table.shape[1:]) if table.per_head else table.shape
        parameter = _empty(shape, torch.float32 if table.keep_float32 else self.config.params_dtype)
        if table.per_head:
            tensor_parallel.set_tensor_model_parallel_attributes(parameter, True, 0, 1)
            with tensor_parallel.get_cuda_rng_tracker().fork():
                table.init(parameter.data)
        else:
            table.init(parameter.data)
            # With sequence parallelism Megatron sums the gradients of such parameters over tensor-parallel ranks.
            setattr(parameter, "sequence_parallel", self.config.sequence_parallel)  # noqa: B010
        return parameter

    def _apply(self, fn: Any, recurse: bool = True) -> MixerLayer:
        """Keep the float32 parameters float32 when the model is cast (Float16Module, ``.bfloat16()``)."""
        names = [table.name for table in self.mixer.all_parameters() if table.keep_float32]
        exact = {name: getattr(self, name).data for name in names}
        super()._apply(fn, recurse)
        for name, data in exact.items():
            parameter = getattr(self, name)
            if parameter.dtype != data.dtype:
                parameter.data = data.to(parameter.device)
        return self

    def weights(self) -> dict[str, Tensor]:
        """The mixer's parameters by name, shared ones routed so that their gradients are whole."""
        sum_here = self.tp_group.size() > 1 and not self.config.sequence_parallel
        weights = {}
        for table in self.mixer.all_parameters():
            weight = getattr(self, table.name)
            if sum_here and not table.per_head:
                # Each rank sees its own heads only: without sequence parallelism nobody else sums this gradient.
                weight = copy_to_tensor_model_parallel_region(weight, group=self.tp_group)
            weights[table.name] = weight
        return weights

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
        fused_TBC, _ = self.in_proj(hidden_states)
        low_rank = [self._heads(module(hidden_states)) for module in self.low_rank.values()]
        x_BTHW = self._heads(fused_TBC)
        batch, length = x_BTHW.shape[:2]
        layout = layout_of(packed_seq_params, batch=batch, local_length=length, cp_group=self.cp_group)
        if inference_context is not None:
            o_BTHV = self._decode(x_BTHW, low_rank, layout, inference_context)
        elif self.config.lsm_recompute and self.training:
            o_BTHV = tensor_parallel.checkpoint(partial(self._mix, layout), False, x_BTHW, *low_rank)
        else:
            o_BTHV = self._mix(layout, x_BTHW, *low_rank)
        o_TBC = o_BTHV.transpose(0, 1).flatten(2)
        return self.out_proj(o_TBC)

    def _heads(self, x_TBC: Tensor) -> Tensor:
        """``[T, B, H * width]`` to ``[B, T, H, width]``, a view."""
        return x_TBC.unflatten(2, (self.place.num_heads, -1)).transpose(0, 1)

    def _mix(self, layout: SequenceLayout, x_BTHW: Tensor, *low_rank: Tensor) -> Tensor:
        """The mixer over this rank's runs, started from the memory that earlier ranks leave."""
        weights = self.weights()
        state, memory_from = None, None
        if layout.cp_size > 1:
            memory_from = partial(initial_states, layout=layout, group=self.cp_group)
            if self.mixer.conv_channels:
                conv_input = self.mixer.conv_input(x_BTHW, weights)
                reach = self.mixer.cfg.conv_size - 1
                state = MixerState((), tokens_before(conv_input, reach, layout, self.cp_group))
        o, _ = self.mixer.mix(
            layout.runs(x_BTHW),
            {name: layout.runs(x) for name, x in zip(self.low_rank, low_rank, strict=True)},
            weights,
            self.place,
            state=state,
            memory_from=memory_from,
            cu_seqlens=layout.run_cu_seqlens,
        )
        return layout.tokens(o)

    def _decode(
        self, x_BTHW: Tensor, low_rank: list[Tensor], layout: SequenceLayout, inference_context: Any
    ) -> Tensor:
        """Prefill or one step, with the state kept where Megatron keeps keys and values."""
        if layout.cp_size > 1 or layout.is_packed or not inference_context.is_static_batching():
            raise ValueError(
                "a mixer decodes with static batching, without context parallelism or packed documents\n"
                "  why: its state is one matrix per sequence and layer\n"
                "  try: a StaticInferenceContext on a model built with context parallel size 1"
            )
        states = inference_context.key_value_memory_dict
        o, states[self.layer_number] = self.mixer.mix(
            x_BTHW,
            dict(zip(self.low_rank, low_rank, strict=True)),
            self.weights(),
            self.place,
            state=states.get(self.layer_number),
        )
        return o

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Per-head parameters are sharded on axis 0; everything else as Megatron does."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        tables = self.mixer.all_parameters()
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            {table.name: getattr(self, table.name) for table in tables},
            prefix,
            {table.name: 0 for table in tables if table.per_head},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        children = {"in_proj": self.in_proj, "out_proj": self.out_proj}
        children |= {f"low_rank.{name}": module for name, module in self.low_rank.items()}
        for name, module in children.items():
            sharded |= sharded_state_dict_default(
                module, f"{prefix}{name}.", sharded_offsets, metadata, self.tp_group
            )
        return sharded

    def backward_dw(self) -> None:
        """Nothing is delayed: weight gradients are computed with the others."""


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.empty(shape, dtype=dtype, device=torch.cuda.current_device()))
