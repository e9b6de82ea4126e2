"""Which classes a layer is built from: ours and Megatron's own, or Transformer Engine's where it is installed.

Norms are always modules of their own and attention is always ours, with both backends: parameter names then do not
depend on the backend, and Transformer Engine's attention does not take documents packed per sequence.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules

from linear_moe.model.attention import CoreAttention
from linear_moe.model.column_linear import ColumnLinear
from linear_moe.model.experts import GroupedExperts, SequentialExperts
from linear_moe.model.norm import LayerNorm, ResidualRMSNorm, RMSNorm


class LinearMoEBackend(BackendSpecProvider):
    """Building blocks that need PyTorch and Megatron only.

    Args:
        sequential_experts: Megatron's loop over experts in place of the grouped GEMM.
    """

    def __init__(self, sequential_experts: bool = False) -> None:
        self.sequential_experts = sequential_experts

    def column_parallel_linear(self) -> type:
        """Linear layer whose outputs are divided over tensor-parallel ranks."""
        return ColumnParallelLinear

    def biased_column_linear(self) -> type:
        """The same for a layer that may have a bias; latent attention refuses subclasses of Megatron's layer."""
        return ColumnLinear

    def row_parallel_linear(self) -> type:
        """Linear layer whose inputs are divided over tensor-parallel ranks."""
        return RowParallelLinear

    def fuse_layernorm_and_linear(self) -> bool:
        """Never: every norm is a module."""
        return False

    def column_parallel_layer_norm_linear(self) -> type | None:
        """There is none."""
        return None

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> Any:
        """Builder of a norm, called with ``config, hidden_size, eps``; ``has_residual``: it may pass its input on."""
        del for_qk
        return (ResidualRMSNorm if has_residual else RMSNorm) if rms_norm else LayerNorm

    def core_attention(self) -> type:
        """Softmax attention between projections."""
        return CoreAttention

    def activation_func(self) -> Any:
        """No module: activations are functions."""
        return None

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool = True) -> Any:
        """Builder of the experts of a layer; the flag does not matter, ``sequential_experts`` does."""
        del moe_use_grouped_gemm
        if not self.sequential_experts:
            return GroupedExperts
        return partial(
            SequentialExperts,
            submodules=MLPSubmodules(
                linear_fc1=self.column_parallel_linear(),
                linear_fc2=self.row_parallel_linear(),
                activation_func=self.activation_func(),
            ),
        )


class TransformerEngineBackend(LinearMoEBackend):
    """Linear layers, norms and experts of Transformer Engine."""

    def __init__(self, sequential_experts: bool = False) -> None:
        super().__init__(sequential_experts)
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        self.te = TESpecProvider()

    def column_parallel_linear(self) -> type:
        """Linear layer whose outputs are divided over tensor-parallel ranks."""
        return self.te.column_parallel_linear()

    def biased_column_linear(self) -> type:
        """The same one."""
        return self.te.column_parallel_linear()

    def row_parallel_linear(self) -> type:
        """Linear layer whose inputs are divided over tensor-parallel ranks."""
        return self.te.row_parallel_linear()

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> Any:
        """Builder of a norm, called with ``config, hidden_size, eps``."""
        return self.te.layer_norm(rms_norm=rms_norm, for_qk=for_qk, has_residual=has_residual)

    def activation_func(self) -> Any:
        """The activation module of Transformer Engine, used only with ``--use-te-activation-func``."""
        return self.te.activation_func()

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool = True) -> Any:
        """Builder of the experts of a layer; the flag does not matter, ``sequential_experts`` does."""
        del moe_use_grouped_gemm
        return self.te.grouped_mlp_modules(not self.sequential_experts)


def make_backend(transformer_impl: str, sequential_experts: bool = False) -> LinearMoEBackend:
    """The backend that ``--transformer-impl`` names: ``local`` or ``transformer_engine``.

    Raises:
        ValueError: another name, or Transformer Engine is not installed.
    """
    if transformer_impl == "local":
        return LinearMoEBackend(sequential_experts)
    if transformer_impl != "transformer_engine":
        raise ValueError(
            f"transformer implementation {transformer_impl!r} is not supported\n"
            f"  why: layers are built from PyTorch and Megatron ('local') or from Transformer Engine\n"
            f"  try: --transformer-impl local"
        )
    if not HAVE_TE:
        raise ValueError(
            "Transformer Engine is not installed\n"
            "  why: --transformer-impl transformer_engine builds its layers from it\n"
            "  try: --transformer-impl local, or pip install -e '.[te]' in the repository"
        )
    return TransformerEngineBackend(sequential_experts)
