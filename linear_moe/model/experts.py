"""Experts whose weights are stacked and multiplied in one grouped GEMM, without Transformer Engine.

    y_t = W2_e act(W1_e x_t) * p_t        for every token t routed to expert e with probability p_t

Takes the place of Megatron's ``SequentialMLP``: same initial weights, same outputs, same checkpoint
(:mod:`linear_moe.model.experts_checkpoint`). Tokens come sorted by expert; the number each has stays on the device.

Letters: M tokens routed to this rank, D hidden size, E experts on this rank, F feed-forward size on this rank (doubled
in ``fc1`` of a gated unit: gate first, then up).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F

from linear_moe.kernels import dispatch, weighted_swiglu
from linear_moe.kernels.grouped_linear import can_group, grouped_linear, looped_linear
from linear_moe.model.experts_checkpoint import ExpertShards
from linear_moe.model.gradient_sums import sums_of

_EXTRA_STATE = "_extra_state_"


class GroupedExperts(MegatronModule):
    """The experts of one MoE layer on this rank.

    Parameters ``fc1_weight`` ``[E, F or 2F, D]`` and ``fc2_weight`` ``[E, D, F]``. Expert parallelism gives a rank E of
    the experts, expert tensor parallelism a slice F of each; the token dispatcher does their communication.

    Raises:
        ValueError: the configuration asks for something these experts cannot do.
    """

    input_again: Callable[[], Callable[[], Tensor]] | None = None
    """Gives what makes the input of this call again, which is then not kept for the backward pass; set by the layer."""

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: Any = None,
        pg_collection: ProcessGroupCollection | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(config=config)
        del submodules, name
        _refuse_unsupported(config)
        assert pg_collection is not None and config.moe_ffn_hidden_size is not None
        self.num_local_experts = num_local_experts
        self.ep_group = pg_collection.ep
        self.tp_group = pg_collection.expt_tp
        self.dp_group = pg_collection.expt_dp
        ffn, tp_size = config.moe_ffn_hidden_size, self.tp_group.size()
        if ffn % tp_size:
            raise ValueError(
                f"expert size {ffn} cannot be divided over {tp_size} ranks\n"
                f"  why: expert tensor parallelism cuts every expert's feed-forward dimension\n"
                f"  try: --expert-tensor-parallel-size 1, or a --moe-ffn-hidden-size that is a multiple of {tp_size}"
            )
        hidden = config.moe_latent_size or config.hidden_size
        gate = 2 if config.gated_linear_unit else 1
        self.fc1_weight = self._weight(gate * ffn // tp_size, hidden, partition_dim=1, stride=gate)
        self.fc2_weight = self._weight(hidden, ffn // tp_size, partition_dim=2, stride=1)
        if config.perform_initialization:
            self._initialize()
        self.register_load_state_dict_pre_hook(_drop_extra_states)

    def forward(
        self, hidden_states: Tensor, tokens_per_expert: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Send every token through its expert.

        Args:
            hidden_states: ``[M, D]``, the tokens of expert 0, then those of expert 1, ...
            tokens_per_expert: ``[E]`` int, sums to M, on any device.
            probs: ``[M]``, the router's probabilities.

        Returns:
            ``[M, D]`` and no bias.
        """
        if self.config.moe_apply_probs_on_input:
            assert self.config.moe_router_topk == 1, "moe_apply_probs_on_input needs moe_router_topk 1"
            hidden_states = (hidden_states * probs[:, None]).to(hidden_states.dtype)
            probs = torch.ones_like(probs)
        linear = self._linear(tokens_per_expert, hidden_states)
        with nullcontext() if self.input_again is None else made_again(hidden_states, self.input_again()):
            inner = linear(hidden_states, self.fc1_weight)
        return linear(self._activate(inner, probs), self.fc2_weight), None

    def backward_dw(self) -> None:
        """Nothing: weight gradients are computed in the backward pass."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """The weights under ``SequentialMLP``'s checkpoint keys, shapes and offsets."""
        shards = ExpertShards(
            num_local=self.num_local_experts,
            ep_group=self.ep_group,
            tp_group=self.tp_group,
            dp_group=self.dp_group,
            sharded_offsets=tuple(sharded_offsets),
            one_key_per_expert=(metadata or {}).get("singleton_local_shards", False),
        )
        key = f"{prefix}experts.linear_"
        state: ShardedStateDict = {
            f"{prefix}fc1_weight": shards.fc1(
                f"{key}fc1.weight", self.fc1_weight, self.config.gated_linear_unit
            ),
            f"{prefix}fc2_weight": shards.fc2(f"{key}fc2.weight", self.fc2_weight),
        }
        for name in ("fc1", "fc2"):
            for e, extra in shards.extra_states(f"{key}{name}._extra_state").items():
                state[f"{prefix}{name}{_EXTRA_STATE}{e}"] = extra
        return state

    def _linear(self, tokens_per_expert: Tensor, x: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        if can_group(x, self.fc1_weight, self.fc2_weight):
            ends = tokens_per_expert.cumsum(0, dtype=torch.int32).to(x.device, non_blocking=True)
            return lambda x, weight: grouped_linear(x, weight, ends, sums_of(weight, self.config))
        if x.is_cuda:
            _warn_of_loop_once(x.dtype, tuple(self.fc1_weight.shape))
        counts = tokens_per_expert.tolist()
        return lambda x, weight: looped_linear(x, weight, counts)

    def _activate(self, x: Tensor, probs: Tensor) -> Tensor:
        config = self.config
        is_plain = config.activation_func_clamp_value is None and not config.glu_linear_offset
        if config.gated_linear_unit and config.activation_func is F.silu and is_plain and _has_fused_unit(x):
            return weighted_swiglu(x, probs)
        if config.gated_linear_unit and config.bias_activation_fusion and config.activation_func is F.silu:
            return weighted_bias_swiglu_impl(x, None, probs[:, None], config.activation_func_fp8_input_store)
        if config.gated_linear_unit:
            gate, up = x.chunk(2, dim=-1)
            if (limit := config.activation_func_clamp_value) is not None:
                gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            out = config.activation_func(gate) * (up + config.glu_linear_offset)
        else:
            out = config.activation_func(x)
        return (out * probs[:, None]).to(out.dtype)

    # ---- weights ----

    def _weight(self, out_size: int, in_size: int, *, partition_dim: int, stride: int) -> torch.nn.Parameter:
        config = self.config
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        shape = (self.num_local_experts, out_size, in_size)
        weight = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device))
        set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=partition_dim, stride=stride)
        # Megatron keeps such parameters in an optimizer of their own and reduces them over expert data-parallel ranks.
        # It does so with expert parallelism only, hence EP = 1 and EP > 1 cannot load each other's optimizer there;
        # the group is the right one in every layout, so here it always does.
        weight.allreduce = False  # type: ignore[attr-defined]
        return weight

    @torch.no_grad()
    def _initialize(self) -> None:
        if self.config.use_cpu_initialization:
            self._initialize_on_cpu()
            return
        # The order of SequentialMLP, so that the same seed gives the same weights.
        for fc1, fc2 in zip(self.fc1_weight, self.fc2_weight, strict=True):
            for weight, init in ((fc1, self.config.init_method), (fc2, self.config.output_layer_init_method)):
                with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
                    init(weight)

    def _initialize_on_cpu(self) -> None:
        """Draw every expert of the layer in full and keep this rank's: the CPU generator is alike on all ranks."""
        first = self.ep_group.rank() * self.num_local_experts
        tp_rank, tp_size = self.tp_group.rank(), self.tp_group.size()
        for i in range(self.ep_group.size() * self.num_local_experts):
            e = i - first
            for weight, init in (
                (self.fc1_weight, self.config.init_method),
                (self.fc2_weight, self.config.output_layer_init_method),
            ):
                dim, stride = weight.partition_dim - 1, weight.partition_stride  # type: ignore[attr-defined]
                shape = list(weight.shape[1:])
                shape[dim] *= tp_size
                whole = torch.empty(shape)
                init(whole)
                if 0 <= e < self.num_local_experts:
                    parts = whole.chunk(stride * tp_size, dim=dim)[tp_rank::tp_size]
                    weight[e].copy_(torch.cat(parts, dim=dim))


class SequentialExperts(SequentialMLP):
    """Megatron's loop over experts, with the optimizer that :class:`GroupedExperts` has: they share checkpoints."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for weight in self.parameters():
            weight.allreduce = False  # type: ignore[attr-defined]


def _drop_extra_states(module: torch.nn.Module, state_dict: dict, prefix: str, *rest: Any) -> None:
    """They are in a checkpoint for the sake of ``SequentialMLP``; there is nothing to load."""
    for name in [name for name in state_dict if name.startswith(prefix) and _EXTRA_STATE in name]:
        del state_dict[name]


def made_again(x: Tensor, again: Callable[[], Tensor]) -> torch.autograd.graph.saved_tensors_hooks:
    """Within, autograd keeps ``again`` in the place of x."""
    storage = x.untyped_storage()._cdata

    def pack(kept: Tensor) -> Any:
        is_x = kept.untyped_storage()._cdata == storage
        return (kept.shape, kept.stride(), kept.storage_offset()) if is_x else kept

    def unpack(kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else again().as_strided(*kept)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _has_fused_unit(x: Tensor) -> bool:
    """Else Megatron's, which it compiles with torch, at the first call of every shape."""
    return dispatch.pick("weighted_swiglu", x.device, x.dtype).name == "triton"


@cache
def _warn_of_loop_once(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    warnings.warn(
        f"experts run one after the other, with a device sync per layer: grouped GEMM needs bf16 and sizes that are "
        f"multiples of 8, got {dtype} and weights {list(shape)}",
        stacklevel=2,
    )


def _refuse_unsupported(config: TransformerConfig) -> None:
    wrong = {
        "biases in experts (--disable-bias-linear is not set)": config.add_bias_linear,
        "fp8 or fp4 experts": config.fp8 or config.fp4,
        "Transformer Engine activations (--use-te-activation-func)": config.use_te_activation_func,
        "interleaved gated units (--moe-mlp-glu-interleave-size)": config.moe_mlp_glu_interleave_size
        is not None,
        "delayed weight gradients (--delay-wgrad-compute)": config.delay_wgrad_compute,
        "recomputing expert activations only (--recompute-modules moe_act)": (
            config.recompute_granularity == "selective" and "moe_act" in (config.recompute_modules or ())
        ),
    }
    for what, is_set in wrong.items():
        if is_set:
            raise ValueError(
                f"{what}: not supported\n"
                f"  why: experts here are two grouped matrix products and an activation function, nothing else\n"
                f"  try: leave that out, or --transformer-impl transformer_engine, if Transformer Engine is installed"
            )
