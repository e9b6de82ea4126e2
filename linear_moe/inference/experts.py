"""Experts of a process that has them all: tokens stay where they are, sorted by expert, and nothing waits.

Megatron's dispatchers serve expert parallelism: they read counts on the host, which a CUDA graph cannot do, and expect
tensor-parallel ranks to hold different tokens. While decoding every rank holds every token, so each computes its slice
of every expert, and one sum over the ranks is all there is to send.
"""

from __future__ import annotations

from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_layer import MoELayer

from linear_moe.kernels.grouped_linear import FEW, can_group
from linear_moe.lsm.mom import MixtureOfMemories
from linear_moe.model.experts import GroupedExperts
from linear_moe.model.local_dispatcher import LocalDispatcher
from linear_moe.model.mixer_layer import MixerLayer

PRODUCTS = ("memory_weight", "_down", "_up")
"""Ends of the names of weights of which every memory of a mixture has its own."""


def keep_tokens_here(model: GPTModel) -> None:
    """Have every layer of experts use a :class:`LocalDispatcher` that knows the other ranks' slices."""
    for module in model.modules():
        if isinstance(module, MoELayer):
            config, dispatcher = module.config, module.token_dispatcher
            assert config.expert_model_parallel_size == 1 and config.moe_expert_capacity_factor is None
            module.token_dispatcher = LocalDispatcher(config.moe_router_topk, dispatcher.tp_group)


def waits_for_host(model: GPTModel) -> str | None:
    """Why a step of the model reads something on the host, so that no CUDA graph can hold it; None: it does not."""
    for module in model.modules():
        if isinstance(module, MoELayer):
            experts = module.experts
            if not isinstance(experts, GroupedExperts):
                return "experts one after the other (--sequential-experts) read their tokens' number"
            weight = experts.fc1_weight
            if not can_group(weight.new_empty(1, weight.shape[2]), weight, experts.fc2_weight):
                return f"experts in {weight.dtype} run one after the other and read their tokens' number"
        if isinstance(module, MixerLayer) and isinstance(module.mixer, MixtureOfMemories):
            weights = [w for name, w in module.weights().items() if name.endswith(PRODUCTS)]
            is_many = module.mixer.cfg.num_memories > FEW
            if is_many and not all(can_group(w.new_empty(1, w.shape[-1])) for w in weights):
                dtype = weights[0].dtype
                return f"more than {FEW} memories in {dtype} run one after the other and read their tokens' number"
    return None
