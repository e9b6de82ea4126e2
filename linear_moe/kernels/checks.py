"""Argument checks of the public kernels: shapes, dtypes and devices; values of CPU tensors only.

A value on a GPU is not looked at, since the host would wait for it: offsets of documents that run backwards, or a decay
that grows, are refused on a CPU and give wrong numbers on a GPU.

Letters: B batch, T tokens, G query/key heads, H heads, K key dim, V value dim, N documents, W width, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from linear_moe.kernels.arriving import State

MAX_HEAD_DIM = 256

_POSITIVE = 1e-5
"""A log decay that counts as zero: numerical gradients step across it."""


_ONE_DTYPE = "q, k and v are read by the same matrix products"


def check_scan(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: State,
    cu_seqlens: Tensor | None,
) -> None:
    """What the recurrence families share; ``q`` is ``None`` for a segment. A ``state`` on its way: `on_arrival`."""
    _check_key_value(k, v)
    if q is not None:
        _check_float("q", q, v.device)
        _check_shape("q", q, k.shape, "[B, T, Hqk, K], as k")
        if q.dtype != v.dtype:
            fail("q", f"is {q.dtype} but v is {v.dtype}", _ONE_DTYPE, f"q.to({v.dtype})")
    if log_decay is not None:
        _check_log_decay(log_decay, k, v)
    check_cu_seqlens(cu_seqlens, v.shape[0], v.shape[1], v.device)
    if state is not None and not callable(state):
        _check_state(state, k, v, cu_seqlens)


def on_arrival(state: State, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> State:
    """``state``; one that is on its way is checked when it arrives."""
    if not callable(state):
        return state
    wait = state
    return lambda: _check_state(wait(), k, v, cu_seqlens)


def _check_state(state: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    num_documents = v.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    _check_float("state", state, v.device)
    _check_shape("state", state, (num_documents, v.shape[2], k.shape[3], v.shape[3]), "[N, H, K, V]")
    return state


def _check_key_value(k: Tensor, v: Tensor) -> None:
    """Shapes and dtypes of what is written."""
    for name, x, legend in (("k", k, "[B, T, Hqk, K]"), ("v", v, "[B, T, H, V]")):
        _check_float(name, x, v.device)
        if x.ndim != 4 or 0 in x.shape:
            fail(name, f"has shape {show(x.shape)}", f"{name} is {legend}", "a non-empty tensor of these")
    num_heads, num_keys, num_values = v.shape[2], k.shape[3], v.shape[3]
    if k.shape[:2] != v.shape[:2]:
        found = f"is {show(k.shape)} but v is {show(v.shape)}"
        fail("k", found, "every token has a key and a value", "k and v of the same B and T")
    if k.dtype != v.dtype:
        fail("k", f"is {k.dtype} but v is {v.dtype}", _ONE_DTYPE, f"k.to({v.dtype})")
    if num_heads % k.shape[2]:
        found = f"has {k.shape[2]} heads and v has {num_heads}"
        fail("k", found, "each head of q and k serves the same number of v's", "a number that divides v's")
    if max(num_keys, num_values) > MAX_HEAD_DIM:
        name = "k" if num_keys > MAX_HEAD_DIM else "v"
        why = "a kernel holds the rows of a memory, K x V, close to where it computes"
        fail(
            name,
            f"has head dim {max(num_keys, num_values)}",
            why,
            f"more heads, of at most {MAX_HEAD_DIM} each",
        )


def _check_log_decay(log_decay: Tensor, k: Tensor, v: Tensor) -> None:
    """Of heads, tokens or channels, after k and v."""
    _check_float("log_decay", log_decay, v.device)
    allowed = [(v.shape[2],), tuple(v.shape[:3]), (*v.shape[:3], k.shape[3])]
    if tuple(log_decay.shape) not in allowed:
        why = "a decay is of heads, [H], of their tokens, [B, T, H], or of channels, [B, T, H, K]"
        shapes = " or ".join(show(shape) for shape in allowed)
        fail("log_decay", f"has shape {show(log_decay.shape)}", why, shapes)
    check_decay("log_decay", log_decay)


def check_diag_decay(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: State,
    cu_seqlens: Tensor | None,
    log_decay_v: Tensor | None,
    bonus: Tensor | None = None,
) -> None:
    """Everything :func:`linear_moe.kernels.diag_decay` takes."""
    check_scan(q, k, v, log_decay, state, cu_seqlens)
    if log_decay_v is not None:
        _check_float("log_decay_v", log_decay_v, v.device)
        _check_shape("log_decay_v", log_decay_v, v.shape, "[B, T, H, V], as v")
        check_decay("log_decay_v", log_decay_v)
    if bonus is not None:
        _check_float("bonus", bonus, v.device)
        _check_shape("bonus", bonus, (v.shape[2], k.shape[3]), "[H, K]")
    if bonus is not None and log_decay_v is not None:
        fail("bonus", "is given together with log_decay_v", "no recurrence here has both", "one of the two")


def check_decay(name: str, log_decay: Tensor) -> None:
    """A logarithm of decay is at most 0; looked at where `_has_values`. (Not a number is let through, as anywhere.)"""
    if _has_values(log_decay) and (largest := log_decay.detach().max().item()) > _POSITIVE:
        why = "it is the logarithm of a factor of at most 1; a larger one makes the memory grow without bound"
        fail(
            name, f"has positive values, up to {largest:.3g}", why, f"-{name}, or the logarithm of the decay"
        )


def check_delta_rule(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: State,
    cu_seqlens: Tensor | None,
    beta: Tensor,
) -> None:
    """Everything :func:`linear_moe.kernels.delta_rule` takes."""
    check_scan(q, k, v, log_decay, state, cu_seqlens)
    _check_float("beta", beta, v.device)
    _check_shape("beta", beta, v.shape[:3], "[B, T, H]")


def check_dplr_delta_rule(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: State,
    cu_seqlens: Tensor | None,
    a: Tensor,
    b: Tensor,
) -> None:
    """Everything :func:`linear_moe.kernels.dplr_delta_rule` takes."""
    check_scan(q, k, v, log_decay, state, cu_seqlens)
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
        fail("x", f"has shape {show(x.shape)}", "x is [B, T, *C]", "a non-empty tensor of these")
    channels = tuple(x.shape[2:])
    if tuple(weight.shape[:-1]) != channels or weight.shape[-1] < 1:
        why = f"weight is [*C, W] with C = {show(channels)}, as in x"
        fail("weight", f"has shape {show(weight.shape)}", why, "one filter of W >= 1 numbers per channel")
    if bias is not None:
        _check_float("bias", bias, x.device)
        _check_shape("bias", bias, channels, "[*C]")
    if activation not in (None, "silu"):
        fail("activation", f"is {activation!r}", "there is no other", 'None or "silu"')
    num_documents = check_cu_seqlens(cu_seqlens, x.shape[0], x.shape[1], x.device)
    if state is not None:
        _check_float("state", state, x.device)
        _check_shape("state", state, (num_documents, weight.shape[-1] - 1, *channels), "[N, W - 1, *C]")


def check_conv_and_split(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    widths: Sequence[int],
    activation: str | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Everything :func:`linear_moe.kernels.conv_and_split` takes."""
    if x.ndim != 4:
        fail("x", f"has shape {show(x.shape)}", "x is [B, T, H, D]", "x.unflatten(-1, (H, D))")
    if weight.ndim != 3 or not 0 < weight.shape[1] <= x.shape[-1]:
        why = f"weight is [H, C, W], of up to {x.shape[-1]} channels"
        fail("weight", f"has shape {show(weight.shape)}", why, "one filter of W >= 1 numbers per channel")
    ends = [sum(widths[: n + 1]) for n in range(len(widths))]
    if weight.shape[1] not in ends or x.shape[-1] != ends[-1]:
        why = f"they are the {x.shape[-1]} channels of x, and some of them its first {weight.shape[1]}, with filters"
        fail("widths", f"is {tuple(widths)}", why, f"({weight.shape[1]}, {x.shape[-1] - weight.shape[1]})")
    check_conv(x[..., : weight.shape[1]], weight, bias, activation, state, cu_seqlens)


def check_gated_norm(x: Tensor, weight: Tensor | None, gate: Tensor | None, activation: str) -> None:
    """Everything :func:`linear_moe.kernels.gated_rms_norm` takes."""
    _check_float("x", x, x.device)
    if x.ndim != 4:
        fail("x", f"has shape {show(x.shape)}", "x is [B, T, H, D]", "x.unflatten(-1, (H, D))")
    if weight is not None:
        _check_float("weight", weight, x.device)
        if tuple(weight.shape) not in (tuple(x.shape[-1:]), tuple(x.shape[-2:])):
            why = "weight is of all heads, [D], or of each, [H, D]"
            shapes = f"{show(x.shape[-1:])} or {show(x.shape[-2:])}"
            fail("weight", f"has shape {show(weight.shape)}", why, shapes)
    if gate is not None:
        _check_float("gate", gate, x.device)
        _check_shape("gate", gate, x.shape, "[B, T, H, D], as x")
    if activation not in ("swish", "sigmoid"):
        fail("activation", f"is {activation!r}", "there is no other", '"swish" or "sigmoid"')


def check_norm(x: Tensor, weight: Tensor) -> None:
    """Everything :func:`linear_moe.kernels.rms_norm` takes."""
    _check_float("x", x, x.device)
    if x.ndim != 3:
        fail("x", f"has shape {show(x.shape)}", "x is [B, T, D]", "x.flatten(0, -2)[None]")
    _check_float("weight", weight, x.device)
    _check_shape("weight", weight, x.shape[2:], "[D]")


def check_scaled(x: Tensor, weight: Tensor) -> None:
    """Everything :func:`linear_moe.kernels.scale_heads` takes."""
    check_gated_norm(x, None, None, "swish")
    _check_float("weight", weight, x.device)
    _check_shape("weight", weight, x.shape[:3], "[B, T, H]")


def check_rotary(q: Tensor, k: Tensor, angles: Tensor) -> None:
    """Everything :func:`linear_moe.kernels.rotate_heads` takes."""
    for name, x in (("q", q), ("k", k), ("angles", angles)):
        _check_float(name, x, q.device)
    if q.ndim != 4:
        fail("q", f"has shape {show(q.shape)}", "q is [B, T, H, K]", "q.unflatten(-1, (H, K))")
    if k.ndim != 4 or k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3]:
        why = "k is [B, T, G, K], of the tokens and the width of q"
        fail("k", f"has shape {show(k.shape)}", why, f"a tensor {show([*q.shape[:2], 'G', q.shape[3]])}")
    if angles.ndim != 3 or angles.shape[:2] != q.shape[:2] or not 0 < 2 * angles.shape[2] <= q.shape[3]:
        why = f"angles is [B, T, R], one for two of the {q.shape[3]} channels of a head"
        shape = show([*q.shape[:2], q.shape[3] // 2])
        fail("angles", f"has shape {show(angles.shape)}", why, f"a tensor {shape}, or with fewer angles")
    if angles.requires_grad and torch.is_grad_enabled():
        fail("angles", "requires a gradient", "angles are constants here", "angles.detach()")


def check_skip_gate_norm(
    x: Tensor,
    skip: Tensor | None,
    skip_weight: Tensor | None,
    weight: Tensor,
    gate: Tensor | None,
    num_groups: int,
    activation: str,
) -> None:
    """Everything :func:`linear_moe.kernels.skip_gate_norm` takes."""
    check_gated_norm(x, None, gate, activation)
    check_each(
        x,
        ("skip", skip, x.shape, "[B, T, H, V], as x"),
        ("skip_weight", skip_weight, x.shape[2:3], "[H]"),
        ("weight", weight, x.shape[2:], "[H, V]"),
    )
    if (skip is None) != (skip_weight is None):
        fail(
            "skip_weight",
            f"is{'' if skip_weight is None else ' not'} None",
            "it is the factor of skip",
            "both",
        )
    if num_groups < 1 or x.shape[2] % num_groups:
        fail("num_groups", f"is {num_groups}", f"every group has as many of the {x.shape[2]} heads", "1")


def check_cross_entropy(logits: Tensor, labels: Tensor, weight: Tensor) -> None:
    """Everything :func:`linear_moe.kernels.cross_entropy_` takes."""
    _check_float("logits", logits, logits.device)
    if logits.ndim != 2 or logits.stride(1) != 1:
        found = f"has shape {show(logits.shape)} and strides {show(logits.stride())}"
        fail("logits", found, "logits is [M, V], and its rows are overwritten", "logits.contiguous()")
    if logits.shape[0] > 1 and logits.stride(0) < logits.shape[1]:
        found = f"has shape {show(logits.shape)} and strides {show(logits.stride())}"
        fail("logits", found, "rows that share memory cannot be overwritten", "logits.contiguous()")
    if logits.requires_grad and torch.is_grad_enabled():
        why = "its rows are overwritten by that gradient, which autograd cannot follow"
        fail("logits", "requires a gradient", why, "logits.detach(), or a call under torch.no_grad()")
    if labels.dtype != torch.int64 or labels.device != logits.device:
        found = f"is {labels.dtype} on {labels.device}"
        fail("labels", found, "labels are rows of logits, next to them", f"int64 on {logits.device}")
    _check_shape("labels", labels, logits.shape[:1], "[M]")
    _check_float("weight", weight, logits.device)
    _check_shape("weight", weight, logits.shape[:1], "[M]")


def check_rows(
    x: Tensor, order: Tensor, place: Tensor, *, of_slots: bool, weight: Tensor | None = None
) -> None:
    """Everything that moves rows of tokens to slots, or rows of slots back to tokens; values are not looked at."""
    for name, index in (("order", order), ("place", place)):
        if index.dtype != torch.int64 or index.device != x.device:
            found = f"is {index.dtype} on {index.device}"
            fail(name, found, "it counts rows of x, next to them", f"int64 on {x.device}")
    if place.ndim != 2 or order.shape != (place.numel(),):
        found = f"has shape {show(place.shape)} and order {show(order.shape)}"
        fail("place", found, "place is [S, k], and order has its S * k slots", "both from one routing")
    num_rows = place.numel() if of_slots else place.shape[0]
    if x.shape[0] != num_rows:
        why = f"it has a row for each {'slot' if of_slots else 'token'} of place, {show(place.shape)}"
        fail("x", f"has {x.shape[0]} rows", why, f"{num_rows} rows")
    if weight is not None:
        _check_float("weight", weight, x.device)
        _check_shape("weight", weight, place.shape, "[S, k], as place")


def check_choice(x: Tensor, per_token: int, is_token: Tensor | None) -> None:
    """Everything :func:`linear_moe.kernels.choose_experts` takes."""
    _check_float("x", x, x.device)
    _check_per_token("x", x, per_token)
    if is_token is not None and (is_token.dtype, is_token.device) != (torch.bool, x.device):
        found = f"is {is_token.dtype} on {is_token.device}"
        fail("is_token", found, "it marks rows of x, next to them", f"bool on {x.device}")
    if is_token is not None:
        _check_shape("is_token", is_token, x.shape[:1], "[N], the rows of x")


def check_slots(chosen: Tensor, probs: Tensor, per_token: int) -> None:
    """Everything :func:`linear_moe.kernels.sort_slots` takes; values are not looked at."""
    if chosen.dtype != torch.bool:
        fail("chosen", f"is {chosen.dtype}", "it marks the experts of each token", "bool")
    _check_per_token("chosen", chosen, per_token)
    _check_float("probs", probs, chosen.device)
    _check_shape("probs", probs, chosen.shape, "[N, E], as chosen")


def _check_per_token(name: str, x: Tensor, per_token: int) -> None:
    if x.ndim != 2:
        fail(name, f"has shape {show(x.shape)}", "it is [N, E]", "a row for each token")
    if not 1 <= per_token <= x.shape[1]:
        why = f"a token has 1 to E experts, and {name} has shape {show(x.shape)}"
        fail("per_token", f"is {per_token}", why, f"1 to {x.shape[1]}")


def check_swiglu(x: Tensor, weight: Tensor) -> None:
    """Everything :func:`linear_moe.kernels.weighted_swiglu` takes."""
    _check_float("x", x, x.device)
    if x.ndim != 2 or x.shape[1] % 2:
        fail("x", f"has shape {show(x.shape)}", "x is [M, 2 F]", "gates and values side by side")
    _check_float("weight", weight, x.device)
    _check_shape("weight", weight, x.shape[:1], "[M]")


def check_weight_grad(total: Tensor, dy: Tensor, x: Tensor, ends: Tensor) -> None:
    """Everything :func:`linear_moe.kernels.grouped_weight_grad_` takes; values are not looked at."""
    for name, rows in (("dy", dy), ("x", x)):
        _check_float(name, rows, total.device)
        if rows.ndim != 2:
            fail(
                name, f"has shape {show(rows.shape)}", f"{name} has a row for each token", "x.flatten(0, -2)"
            )
    if x.dtype != dy.dtype:
        fail("x", f"is {x.dtype} but dy is {dy.dtype}", "a product reads both", f"x.to({dy.dtype})")
    if len(x) != len(dy):
        found = f"has {len(x)} rows, and dy {len(dy)}"
        fail("x", found, "every token has an input and an output", "rows of the same tokens")
    if (ends.dtype, ends.device) != (torch.int32, total.device) or ends.ndim != 1:
        found = f"is {ends.dtype} of shape {show(ends.shape)} on {ends.device}"
        fail("ends", found, "ends is [E], next to total", f"int32 on {total.device}")
    _check_shape("total", total, (len(ends), dy.shape[1], x.shape[1]), "[E, O, I]")
    if total.dtype != (dtype := torch.promote_types(dy.dtype, torch.float32)):
        fail("total", f"is {total.dtype}", f"it is a sum of products of {dy.dtype}", f"total.to({dtype})")


def check_adam(param: Tensor, tensors: dict[str, Tensor], half: Tensor | None, step: Tensor) -> None:
    """Everything :func:`linear_moe.kernels.adam_` takes."""
    _check_float("param", param, param.device)
    for name, x in (tensors | ({} if half is None else {"half": half})).items():
        _check_float(name, x, param.device)
        _check_shape(name, x, param.shape, "param's shape")
        if name != "half" and x.dtype != param.dtype:
            fail(name, f"is {x.dtype} but param is {param.dtype}", "they are added up", f"{param.dtype}")
    if step.device.type != "cpu" or step.ndim:
        found = f"has shape {show(step.shape)} on {step.device}"
        fail("step", found, "the host would wait for its value", "torch.tensor(1.0), on the CPU")


def check_cu_seqlens(cu_seqlens: Tensor | None, batch: int, num_tokens: int, device: torch.device) -> int:
    """Returns the number of documents. Values are looked at where `_has_values`."""
    if cu_seqlens is None:
        return batch
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        found = f"is {cu_seqlens.dtype} of shape {show(cu_seqlens.shape)}"
        why = "cu_seqlens is [N + 1]: 0, then the end of each document"
        fail("cu_seqlens", found, why, "an int32 or int64 tensor of at least two numbers")
    if cu_seqlens.device != device:
        fail("cu_seqlens", f"is on {cu_seqlens.device}", f"the tokens are on {device}", f'.to("{device}")')
    if batch != 1:
        why = "packed documents are one row"
        fail("cu_seqlens", f"is given with B = {batch}", why, "x.flatten(0, 1)[None] for every x [B, T, ...]")
    if _has_values(cu_seqlens):
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] > num_tokens or bounds != sorted(bounds):
            found = f"runs from {bounds[0]} to {bounds[-1]}"
            why = "each document ends where the next one starts"
            fail("cu_seqlens", found, why, f"non-decreasing offsets from 0 to at most T = {num_tokens}")
    return len(cu_seqlens) - 1


def _has_values(x: Tensor) -> bool:
    """Whether values can be looked at without waiting for a device: on the CPU, where nobody traces (torch.export)."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def check_each(x: Tensor, *rows: tuple[str, Tensor | None, Sequence[int], str]) -> None:
    """Names, tensors next to ``x``, their shapes and what these are called; ``None`` is no tensor."""
    for name, tensor, shape, legend in rows:
        if tensor is not None:
            _check_float(name, tensor, x.device)
            _check_shape(name, tensor, shape, legend)


def _check_float(name: str, x: Tensor, device: torch.device) -> None:
    if not x.is_floating_point():
        fail(name, f"is {x.dtype}", "it is multiplied and summed", f"a floating-point tensor: {name}.float()")
    if x.device != device:
        fail(name, f"is on {x.device}", f"the others are on {device}", f'{name}.to("{device}")')


def _check_shape(name: str, x: Tensor, shape: Sequence[int], legend: str) -> None:
    if tuple(x.shape) != tuple(shape):
        fail(name, f"has shape {show(x.shape)}", f"{name} is {legend}", f"a tensor {show(shape)}")


def fail(name: str, found: str, why: str, instead: str) -> NoReturn:
    """One clear error."""
    raise ValueError(f"{name} {found}\n  why: {why}\n  try: {instead}")


def show(shape: Sequence[int | str]) -> str:
    """As one types it."""
    return str(list(shape)).replace("'", "")
