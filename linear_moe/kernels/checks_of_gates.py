"""Argument checks of the public kernels in ``gates``.

Letters: as there.
"""

from __future__ import annotations

from torch import Tensor

from linear_moe.kernels.checks import check_each, check_gated_norm, fail, show
from linear_moe.kernels.log_decay import FORMS


def check_log_decay_of(x: Tensor, rate: Tensor | None, bias: Tensor | None, form: str) -> None:
    """Everything :func:`linear_moe.kernels.log_decay_of` takes."""
    check_gated_norm(x, None, None, "swish")
    check_each(x, ("rate", rate, x.shape[2:3], "[H]"), ("bias", bias, x.shape[2:], "[H, K]"))
    if form not in FORMS:
        fail("form", f"is {form!r}", "there is no other", " or ".join(f'"{name}"' for name in FORMS))


def check_bounded_decay_of(x: Tensor, bound: Tensor) -> None:
    """Everything :func:`linear_moe.kernels.bounded_decay_of` takes."""
    check_gated_norm(x, None, None, "swish")
    check_each(x, ("bound", bound, x.shape[2:], "[H, K]"))


def check_lerp_tokens(
    x: Tensor, other: Tensor, weight: Tensor | None, logits: Tensor | None, activation: str | None
) -> None:
    """Everything :func:`linear_moe.kernels.lerp_tokens` takes."""
    if x.ndim != 3:
        fail("x", f"has shape {show(x.shape)}", "x is [B, T, D]", "x.flatten(2)")
    if weight is None and logits is None:
        fail("weight", "is None as logits is", "they say how much of other each mix has", "one of them")
    mixes = len(weight) if weight is not None else logits.shape[2:3].numel() if logits is not None else 0
    check_each(
        x,
        ("x", x, x.shape, ""),
        ("other", other, x.shape, "[B, T, D], as x"),
        ("weight", weight, (mixes, x.shape[2]), "[N, D]"),
        ("logits", logits, (*x.shape[:2], mixes, x.shape[2]), "[B, T, N, D]"),
    )
    if activation not in (None, "sigmoid"):
        fail("activation", f"is {activation!r}", "there is no other", 'None or "sigmoid"')


def check_edit_keys(k: Tensor, logits: Tensor, scale: Tensor, strength: Tensor) -> None:
    """Everything :func:`linear_moe.kernels.edit_keys` takes."""
    if k.ndim != 4:
        fail("k", f"has shape {show(k.shape)}", "k is [B, T, H, K]", "k.unflatten(-1, (H, K))")
    of_heads = [(name, x, k.shape[2:], "[H, K]") for name, x in (("scale", scale), ("strength", strength))]
    check_each(k, ("k", k, k.shape, ""), ("logits", logits, k.shape, "[B, T, H, K], as k"), *of_heads)


def check_gated_group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gate: Tensor | None,
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    bonus: Tensor | None,
    activation: str | None,
) -> None:
    """Everything :func:`linear_moe.kernels.gated_group_norm` takes."""
    check_gated_norm(x, None, gate, activation or "swish")
    own = {"q": q, "k": k, "v": v, "bonus": bonus}
    given = [name for name, tensor in own.items() if tensor is not None]
    if len(given) not in (0, len(own)):
        missing = next(name for name in own if name not in given)
        fail(missing, "is None", f"a token reads of its own by {', '.join(own)}", "all of them, or none")
    of_keys = x.shape[:3] if q is None else (*x.shape[:3], q.shape[-1])
    check_each(
        x,
        ("weight", weight, x.shape[2:], "[H, V]"),
        ("bias", bias, x.shape[2:], "[H, V]"),
        ("q", q, of_keys, "[B, T, H, K]"),
        ("k", k, of_keys, "[B, T, H, K], as q"),
        ("v", v, x.shape, "[B, T, H, V], as x"),
        ("bonus", bonus, of_keys[2:], "[H, K]"),
    )
