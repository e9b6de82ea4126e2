"""Layers of flash-linear-attention 0.6.0 on a CPU in float64: its own torch functions in place of its Triton kernels.

Its layers are Python around Triton operators. ``in_torch`` puts, where a layer looks an operator up, the naive
function that the library publishes beside that operator (``fla/ops/*/naive.py``, ``*_ref``), or torch's own function
where there is none (convolution, SiLU, L2 norm). What an operator's flags add to it (gate, beta, unit q and k) is
spelt out here from its documentation. Nothing of ours is called.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests.oracle.double import in_double

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # "Triton is not supported on current platform"
    import fla.layers
    from fla.modules import activations
    from fla.modules.norm import layernorm, layernorm_gated
    from fla.modules.rotary.ops import rotary_embedding_ref
    from fla.modules.token_shift import token_shift_ref
    from fla.ops.based.naive import naive_parallel_based
    from fla.ops.delta_rule.naive import delta_rule_recurrence
    from fla.ops.gated_delta_rule.gate import naive_gdn_gate
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
    from fla.ops.generalized_delta_rule.dplr.naive import dplr_recurrence
    from fla.ops.gla.naive import naive_recurrent_gla
    from fla.ops.gsa.naive import naive_recurrent_gsa
    from fla.ops.kda.gate import naive_kda_gate, naive_kda_lowerbound_gate
    from fla.ops.kda.naive import naive_recurrent_kda
    from fla.ops.linear_attn.naive import naive_recurrent_linear_attn
    from fla.ops.rebased.naive import naive_parallel_rebased
    from fla.ops.retention.naive import naive_retention
    from fla.ops.rwkv6.recurrent_naive import naive_recurrent_rwkv6
    from fla.ops.rwkv7.fused_addcmul import torch_addcmul_rwkv7
    from fla.ops.rwkv7.fused_k_update import k_update_ref
    from fla.ops.rwkv7.gate_output_correction import gate_output_correction_ref
    from fla.ops.simple_gla.naive import naive_recurrent_simple_gla


def _unit(x: Tensor) -> Tensor:
    """``fla.modules.norm.l2norm``: 1e-6 under the root."""
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def _head_first(op: Callable[..., Any]) -> Callable[..., Any]:
    """An operator over ``[B, T, H, ..]`` out of a naive function over ``[B, H, T, ..]``."""

    def call(*sequences: Tensor, **options: Any) -> Any:
        result = op(*(x.transpose(1, 2) for x in sequences), **options)
        return (
            (result[0].transpose(1, 2), *result[1:]) if isinstance(result, tuple) else result.transpose(1, 2)
        )

    return call


def linear_attn(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, normalize: bool, **_: Any
) -> tuple[Tensor, None]:
    return naive_recurrent_linear_attn(q, k, v, scale=scale, normalize=normalize)


def simple_gla(
    q: Tensor, k: Tensor, v: Tensor, *, g_gamma: Tensor, scale: float, **_: Any
) -> tuple[Tensor, None]:
    return naive_recurrent_simple_gla(q, k, v, g_gamma.expand(q.shape[:3]), scale)


def gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, **_: Any) -> tuple[Tensor, None]:
    return naive_recurrent_gla(q, k, v, g)


def gsa(q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor, scale: float, **_: Any) -> tuple[Tensor, None]:
    return naive_recurrent_gsa(q, k, v, s, g, scale)


def retention(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> tuple[Tensor, None]:
    return _head_first(naive_retention)(q, k, v), None


def rwkv6(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, scale: float, **_: Any
) -> tuple[Tensor, None]:
    heads_first = (x.transpose(1, 2) for x in (r, k, v, w))
    return naive_recurrent_rwkv6(*heads_first, u, scale)[0].transpose(1, 2), None


def rwkv7(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, scale: float, **_: Any
) -> tuple[Tensor, None]:
    # dplr_recurrence scales by K^-1/2 whatever it is told
    o, _state = _head_first(dplr_recurrence)(r * scale * r.shape[-1] ** 0.5, k, v, a, b, w)
    return o, None


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, *, use_qk_l2norm_in_kernel: bool, **_: Any
) -> tuple[Tensor, None]:
    if use_qk_l2norm_in_kernel:
        q, k = _unit(q), _unit(k)
    return _head_first(delta_rule_recurrence)(q, k, v, beta)[0], None


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    use_qk_l2norm_in_kernel: bool,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    assert use_qk_l2norm_in_kernel
    if use_gate_in_kernel:
        g = naive_gdn_gate(g, A_log, dt_bias)
    if use_beta_sigmoid_in_kernel:
        beta = beta.sigmoid() * (2 if allow_neg_eigval else 1)
    tensors = [_unit(q), _unit(k), v, beta, g]
    if cu_seqlens is None:
        return naive_recurrent_gated_delta_rule(*tensors)[0], None
    runs = zip(*(x.split(cu_seqlens.diff().tolist(), dim=1) for x in tensors), strict=True)
    return torch.cat([naive_recurrent_gated_delta_rule(*run)[0] for run in runs], dim=1), None


def kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    A_log: Tensor,
    dt_bias: Tensor,
    allow_neg_eigval: bool,
    lower_bound: float | None,
    **_: Any,
) -> tuple[Tensor, None]:
    if lower_bound is None:
        g = naive_kda_gate(g, A_log, dt_bias)
    else:
        g = naive_kda_lowerbound_gate(g, A_log, dt_bias, lower_bound)
    beta = beta.sigmoid() * (2 if allow_neg_eigval else 1)
    return naive_recurrent_kda(_unit(q), _unit(k), v, g, beta)[0], None


def based(q: Tensor, k: Tensor, v: Tensor, scale: float, use_norm: bool) -> Tensor:
    return _head_first(naive_parallel_based)(q, k, v, scale=scale, use_norm=use_norm)


def rebased(q: Tensor, k: Tensor, v: Tensor, eps: float, use_scale: bool, use_normalize: bool) -> Tensor:
    """The naive function adds 1e-6 to the denominator; the operator adds what it is told."""
    assert use_scale and use_normalize
    o, weights = (
        _head_first(naive_parallel_rebased)(q, k, x, use_norm=False) for x in (v, torch.ones_like(v[..., :1]))
    )
    return o / (weights + eps)


def short_conv(self: torch.nn.Conv1d, x: Tensor, cu_seqlens: Tensor | None = None, **_: Any) -> tuple:
    """``ShortConvolution.forward`` by torch's convolution: it pads by one token less than its width on both sides."""
    if cu_seqlens is not None:
        runs = x.split(cu_seqlens.diff().tolist(), dim=1)
        return torch.cat([short_conv(self, run)[0] for run in runs], dim=1), None
    y = torch.nn.Conv1d.forward(self, x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
    return (F.silu(y) if self.activation else y), None


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, **_: Any) -> tuple[Tensor, None]:
    padded = F.pad(x.transpose(1, 2), (weight.shape[1] - 1, 0))
    y = F.conv1d(padded, weight[:, None], bias, groups=weight.shape[0]).transpose(1, 2)
    return (F.silu(y) if activation else y), None


def rms_norm_gated(
    x: Tensor, g: Tensor, weight: Tensor, bias: None, activation: str, eps: float, **_: Any
) -> Tensor:
    act = torch.sigmoid if activation == "sigmoid" else F.silu
    return layernorm.rms_norm_ref(x, weight, bias, eps=eps) * act(g)


def rms_norm(x: Tensor, weight: Tensor, bias: None, eps: float, **_: Any) -> Tensor:
    return layernorm.rms_norm_ref(x, weight, bias, eps=eps)


def rms_norm_linear(
    x: Tensor, norm_weight: Tensor, norm_bias: None, weight: Tensor, bias: None, eps: float = 1e-5
) -> Tensor:
    return F.linear(layernorm.rms_norm_ref(x, norm_weight, norm_bias, eps=eps), weight, bias)


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, num_groups: int, **_: Any) -> Tensor:
    return layernorm.group_norm_ref(x, weight, bias, num_groups, eps=eps)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, **_: Any) -> Tensor:
    return rotary_embedding_ref(x, cos, sin, interleaved)


def token_shift(
    x: Tensor, cu_seqlens: None = None, cache: None = None, output_cache: bool = False
) -> Tensor | tuple[Tensor, None]:
    shifted = token_shift_ref(x, cu_seqlens)
    return (shifted, None) if output_cache else shifted


def rms_norm_group(
    x: Tensor,
    weight: Tensor,
    bias: None,
    z: Tensor,
    eps: float,
    group_size: int | None,
    norm_before_gate: bool,
    **_: Any,
) -> Tensor:
    return layernorm_gated.rms_norm_ref(x, weight, bias, z, eps, group_size, norm_before_gate)


class StableSort(TorchFunctionMode):
    """``argsort`` keeps the order of equals, as it does on a GPU: the tokens of a memory (``fla/layers/mom.py``)."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        stable = {"stable": True} if func is Tensor.argsort else {}
        return func(*args, **(kwargs or {}), **stable)


REPLACED: dict[str, dict[str, Callable]] = {
    "fla.layers.linear_attn": {"chunk_linear_attn": linear_attn, "elu_p1": lambda x: F.elu(x) + 1},
    "fla.layers.gla": {"chunk_gla": gla},
    "fla.layers.hgrn2": {"chunk_gla": gla, "swish": F.silu, "rms_norm_linear": rms_norm_linear},
    "fla.layers.gsa": {"chunk_gsa": gsa, "rms_norm_linear": rms_norm_linear},
    "fla.layers.multiscale_retention": {"chunk_retention": retention},
    "fla.layers.based": {"parallel_based": based, "chunk_linear_attn": linear_attn},
    "fla.layers.rebased": {"parallel_rebased": rebased, "chunk_linear_attn": linear_attn},
    "fla.layers.delta_net": {"chunk_delta_rule": delta_rule, "elu_p1": lambda x: F.elu(x) + 1},
    "fla.layers.gated_deltanet": {"chunk_gated_delta_rule": gated_delta_rule, "causal_conv1d": conv},
    "fla.layers.mom": {"chunk_gated_delta_rule": gated_delta_rule},
    "fla.layers.kda": {"chunk_kda": kda},
    "fla.layers.rwkv6": {"chunk_rwkv6": rwkv6, "token_shift": token_shift},
    "fla.layers.rwkv7": {
        "chunk_rwkv7": rwkv7,
        "token_shift": token_shift,
        "fused_addcmul_rwkv7": torch_addcmul_rwkv7,
        "fused_k_rwkv7": k_update_ref,
        "l2_norm": _unit,
        "gate_output_correction": gate_output_correction_ref,
    },
    "fla.ops.lightning_attn.chunk": {"chunk_simple_gla": simple_gla},
    "fla.modules.feature_map": {"layer_norm": layernorm.layer_norm_ref, "swish": F.silu},
    "fla.modules.norm.fused_norm_gate": {"rms_norm_gated": rms_norm_gated},
    "fla.modules.norm.layernorm": {"rms_norm": rms_norm, "group_norm": group_norm},
    "fla.modules.norm.layernorm_gated": {"rmsnorm_fn": rms_norm_group},
    "fla.modules.rotary.ops": {"rotary_embedding": rotary},
}
"""What each module of the library looks up, and what it finds instead."""


@contextmanager
def in_torch() -> Iterator[None]:
    """Inside, layers of the library are built, run and differentiated in float64 without Triton."""
    with ExitStack() as stack:
        for module, changes in REPLACED.items():
            for name, function in changes.items():
                stack.enter_context(mock.patch.object(importlib.import_module(module), name, function))
        stack.enter_context(mock.patch.object(fla.modules.ShortConvolution, "forward", short_conv))
        stack.enter_context(
            mock.patch.dict(activations.ACT2FN, swish=F.silu, silu=F.silu, sigmoid=torch.sigmoid)
        )
        stack.enter_context(in_double())
        stack.enter_context(StableSort())
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        yield
