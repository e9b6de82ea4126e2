"""Argument checks of the public kernels: shapes, dtypes and devices, never values on a device (that would wait for it).

Letters: B batch, T tokens, G query/key heads, H heads, K key dim, V value dim, N documents, W width, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

MAX_HEAD_DIM = 256


def check_scan(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """What the recurrence families share; ``q`` is ``None`` for a segment."""
    for name, x, legend in (("k", k, "[B, T, Hqk, K]"), ("v", v, "[B, T, H, V]")):
        _check_float(name, x, v.device)
        if x.ndim != 4 or 0 in x.shape:
            _fail(name, f"has shape {_show(x.shape)}", f"a non-empty tensor {legend}")
    batch, num_tokens, num_heads, num_values = v.shape
    num_keys = k.shape[3]
    if k.shape[:2] != v.shape[:2]:
        _fail("k", f"is {_show(k.shape)} but v is {_show(v.shape)}", "k and v of the same B and T")
    if k.dtype != v.dtype:
        _fail("k", f"is {k.dtype} but v is {v.dtype}", "q, k and v of one dtype")
    if num_heads % k.shape[2]:
        _fail("k", f"has {k.shape[2]} heads and v has {num_heads}", "a number of q/k heads that divides v's")
    if max(num_keys, num_values) > MAX_HEAD_DIM:
        name = "k" if num_keys > MAX_HEAD_DIM else "v"
        _fail(
            name,
            f"has head dim {max(num_keys, num_values)}",
            f"head dims up to {MAX_HEAD_DIM}: use more heads",
        )
    if q is not None:
        _check_float("q", q, v.device)
        _check_shape("q", q, k.shape, "[B, T, Hqk, K], as k")
        if q.dtype != v.dtype:
            _fail("q", f"is {q.dtype} but v is {v.dtype}", "q, k and v of one dtype")
    if log_decay is not None:
        _check_float("log_decay", log_decay, v.device)
        allowed = [(num_heads,), (batch, num_tokens, num_heads), (batch, num_tokens, num_heads, num_keys)]
        if tuple(log_decay.shape) not in allowed:
            options = "[H], [B, T, H] or [B, T, H, K]: " + " or ".join(_show(shape) for shape in allowed)
            _fail("log_decay", f"has shape {_show(log_decay.shape)}", options)
    num_documents = check_cu_seqlens(cu_seqlens, batch, num_tokens, v.device)
    if state is not None:
        _check_float("state", state, v.device)
        _check_shape("state", state, (num_documents, num_heads, num_keys, num_values), "[N, H, K, V]")


def check_diag_extras(k: Tensor, v: Tensor, log_decay_v: Tensor | None, bonus: Tensor | None = None) -> None:
    """``log_decay_v`` and ``bonus``, after :func:`check_scan`."""
    if log_decay_v is not None:
        _check_float("log_decay_v", log_decay_v, v.device)
        _check_shape("log_decay_v", log_decay_v, v.shape, "[B, T, H, V], as v")
    if bonus is not None:
        _check_float("bonus", bonus, v.device)
        _check_shape("bonus", bonus, (v.shape[2], k.shape[3]), "[H, K]")
    if bonus is not None and log_decay_v is not None:
        _fail("bonus", "is given together with log_decay_v", "one of the two: no mixer defines both")


def check_beta(v: Tensor, beta: Tensor) -> None:
    """``beta``, after :func:`check_scan`."""
    _check_float("beta", beta, v.device)
    _check_shape("beta", beta, v.shape[:3], "[B, T, H]")


def check_low_rank(k: Tensor, a: Tensor, b: Tensor) -> None:
    """``a`` and ``b``, after :func:`check_scan`."""
    for name, x in (("a", a), ("b", b)):
        _check_float(name, x, k.device)
        _check_shape(name, x, k.shape, "[B, T, Hqk, K], as k")


def check_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Everything :func:`linear_moe.kernels.short_conv` takes."""
    _check_float("x", x, x.device)
    _check_float("weight", weight, x.device)
    if x.ndim < 3 or 0 in x.shape:
        _fail("x", f"has shape {_show(x.shape)}", "a non-empty tensor [B, T, *C]")
    channels = tuple(x.shape[2:])
    if tuple(weight.shape[:-1]) != channels or weight.shape[-1] < 1:
        _fail("weight", f"has shape {_show(weight.shape)}", f"[*C, W] with C = {_show(channels)}, as in x")
    if bias is not None:
        _check_float("bias", bias, x.device)
        _check_shape("bias", bias, channels, "[*C]")
    if activation not in (None, "silu"):
        _fail("activation", f"is {activation!r}", 'None or "silu"')
    num_documents = check_cu_seqlens(cu_seqlens, x.shape[0], x.shape[1], x.device)
    if state is not None:
        _check_float("state", state, x.device)
        _check_shape("state", state, (num_documents, weight.shape[-1] - 1, *channels), "[N, W - 1, *C]")


def check_gated_norm(x: Tensor, weight: Tensor | None, gate: Tensor | None, activation: str) -> None:
    """Everything :func:`linear_moe.kernels.gated_rms_norm` takes."""
    _check_float("x", x, x.device)
    if x.ndim != 4:
        _fail("x", f"has shape {_show(x.shape)}", "a tensor [B, T, H, D]")
    if weight is not None:
        _check_float("weight", weight, x.device)
        if tuple(weight.shape) not in (tuple(x.shape[-1:]), tuple(x.shape[-2:])):
            expected = f"[D] = {_show(x.shape[-1:])} or [H, D] = {_show(x.shape[-2:])}"
            _fail("weight", f"has shape {_show(weight.shape)}", expected)
    if gate is not None:
        _check_float("gate", gate, x.device)
        _check_shape("gate", gate, x.shape, "[B, T, H, D], as x")
    if activation not in ("swish", "sigmoid"):
        _fail("activation", f"is {activation!r}", '"swish" or "sigmoid"')


def check_cross_entropy(logits: Tensor, labels: Tensor, weight: Tensor) -> None:
    """Everything :func:`linear_moe.kernels.cross_entropy_` takes."""
    _check_float("logits", logits, logits.device)
    if logits.ndim != 2 or logits.stride(1) != 1:
        found = f"has shape {_show(logits.shape)} and strides {_show(logits.stride())}"
        _fail("logits", found, "[M, V] with contiguous rows")
    if labels.dtype != torch.int64 or labels.device != logits.device:
        _fail("labels", f"is {labels.dtype} on {labels.device}", f"int64 on {logits.device}")
    _check_shape("labels", labels, logits.shape[:1], "[M]")
    _check_float("weight", weight, logits.device)
    _check_shape("weight", weight, logits.shape[:1], "[M]")


def check_rows(x: Tensor, order: Tensor, place: Tensor, num_rows: int) -> None:
    """Everything that moves between tokens and slots; values are not looked at."""
    for name, index in (("order", order), ("place", place)):
        if index.dtype != torch.int64 or index.device != x.device:
            _fail(name, f"is {index.dtype} on {index.device}", f"int64 on {x.device}")
    if place.ndim != 2 or order.shape != (place.numel(),):
        found = f"has shape {_show(place.shape)} and order {_show(order.shape)}"
        _fail("place", found, "[S, k] and the order of its S * k slots")
    if x.shape[0] != num_rows or num_rows not in (place.shape[0], place.numel()):
        _fail("x", f"has {x.shape[0]} rows", f"{num_rows} rows, with place {_show(place.shape)}")


def check_swiglu(x: Tensor, weight: Tensor) -> None:
    """Everything :func:`linear_moe.kernels.weighted_swiglu` takes."""
    _check_float("x", x, x.device)
    if x.ndim != 2 or x.shape[1] % 2:
        _fail("x", f"has shape {_show(x.shape)}", "a tensor [M, 2 F]")
    _check_float("weight", weight, x.device)
    _check_shape("weight", weight, x.shape[:1], "[M]")


def check_cu_seqlens(cu_seqlens: Tensor | None, batch: int, num_tokens: int, device: torch.device) -> int:
    """Returns the number of documents. Values are looked at on the CPU only."""
    if cu_seqlens is None:
        return batch
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        found = f"is {cu_seqlens.dtype} of shape {_show(cu_seqlens.shape)}"
        _fail("cu_seqlens", found, "an int32 or int64 tensor [N + 1]: 0, then the end of each document")
    if cu_seqlens.device != device:
        _fail("cu_seqlens", f"is on {cu_seqlens.device}", f"a tensor on {device}, where the tokens are")
    if batch != 1:
        _fail(
            "cu_seqlens", f"is given with B = {batch}", "packed documents as one row: x.flatten(0, 1)[None]"
        )
    if cu_seqlens.device.type == "cpu":
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] > num_tokens or bounds != sorted(bounds):
            found = f"runs from {bounds[0]} to {bounds[-1]}"
            _fail("cu_seqlens", found, f"non-decreasing offsets from 0 to at most T = {num_tokens}")
    return len(cu_seqlens) - 1


def _check_float(name: str, x: Tensor, device: torch.device) -> None:
    if not x.is_floating_point():
        _fail(name, f"is {x.dtype}", "a floating-point tensor")
    if x.device != device:
        _fail(name, f"is on {x.device}", f"a tensor on {device}, where the others are")


def _check_shape(name: str, x: Tensor, shape: Sequence[int], legend: str) -> None:
    if tuple(x.shape) != tuple(shape):
        _fail(name, f"has shape {_show(x.shape)}", f"{legend} = {_show(shape)}")


def _fail(name: str, found: str, expected: str) -> NoReturn:
    raise ValueError(f"{name} {found}. Pass {expected}.")


def _show(shape: Sequence[int]) -> str:
    return str(list(shape))
