"""Parts of a fused projection: their gradients side by side, in words as wide as they can be."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from linear_moe.lsm import split

HALF, WHOLE = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("dtype", "widths", "word"),
    [
        (HALF, (64, 64, 8), torch.complex128),
        (HALF, (64, 12), torch.int64),
        (HALF, (64, 6), torch.int32),
        (HALF, (64, 1), HALF),
        (WHOLE, (4, 8), torch.complex128),
        (WHOLE, (3, 8), torch.int32),
        (torch.float64, (4, 2), torch.complex128),
        (torch.float64, (4, 3), torch.int64),
    ],
)
@pytest.mark.parametrize(
    "way", ["rows first", "time first", "expanded", "one is missing", "columns", "at an odd place"]
)
def test_gradients_lie_side_by_side(
    dtype: torch.dtype, widths: tuple[int, ...], word: torch.dtype, way: str
) -> None:
    """Wherever they come from, to the bit."""
    T, B, H = 5, 3, 2
    x_TBHW = torch.zeros(T, B, H, sum(widths), dtype=dtype).requires_grad_()
    parts = split._Parts.apply(widths, x_TBHW)
    assert all(part.data_ptr() == x_TBHW[..., at:].data_ptr() for part, at in zip(parts, (0, widths[0])))
    grads = [torch.randn(B, T, H, width).to(dtype).transpose(0, 1) for width in widths]
    if way == "time first":
        grads = [grad.contiguous() for grad in grads]
    if way == "expanded":
        grads[0] = torch.ones((), dtype=dtype).expand(grads[0].shape)
    if way == "columns":
        grads[0] = grads[0].contiguous().transpose(-1, -2).contiguous().transpose(-1, -2)
    if way == "at an odd place":  # no word but one of the dtype's own size begins there
        grads[0] = torch.randn(T, B, H, widths[0] + 1).to(dtype)[..., 1:]
        word = {WHOLE: torch.int32, torch.float64: torch.int64}.get(dtype, dtype)
    used = slice(1, None) if way == "one is missing" else slice(None)
    with mock.patch.object(torch, "cat", wraps=torch.cat) as cat:
        (found,) = torch.autograd.grad(parts[used], x_TBHW, grads[used])
    assert {x.dtype for x in cat.call_args.args[0]} == {word}
    if way == "one is missing":
        grads[0] = torch.zeros_like(grads[0])
    assert found.is_contiguous() and found.dtype == dtype and torch.equal(found, torch.cat(grads, -1))


def test_gradients_have_gradients() -> None:
    x = torch.randn(2, 1, 2, 6, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda x: [part.square() for part in split._Parts.apply((4, 2), x)], x
    )
