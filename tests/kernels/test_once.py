"""A second derivative is refused by every operation, whatever its first one came from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from linear_moe import kernels

CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "diag_decay": lambda x: kernels.diag_decay(x, x, x, -x.square())[0],
    "delta_rule": lambda x: kernels.delta_rule(x, x, x, x[..., 0])[0],
    "dplr_delta_rule": lambda x: kernels.dplr_delta_rule(x, x, x, x, x)[1],
    "diag_decay_segment": lambda x: kernels.diag_decay_segment(x, x).state,
    "delta_rule_segment": lambda x: kernels.delta_rule_segment(x, x, x[..., 0]).state,
    "short_conv": lambda x: kernels.short_conv(x, x[0, :3].movedim(0, -1))[0],
    "conv_and_split": lambda x: kernels.conv_and_split(x, x[0, :2, :, :2].movedim(0, -1), widths=(2, 2))[0],
    "gated_rms_norm": lambda x: kernels.gated_rms_norm(x, gate=x),
    "log_decay_of": lambda x: kernels.log_decay_of(x, x[0, 0, :, 0]),
    "bounded_decay_of": lambda x: kernels.bounded_decay_of(x, x[0, 0])[1],
    "lerp_tokens": lambda x: kernels.lerp_tokens(x[:, :, 0], x[:, :, 0] ** 2, x[0, :1, 0])[0],
    "edit_keys": lambda x: kernels.edit_keys(x, x, x[0, 0], x[0, 0])[2],
    "gated_group_norm": lambda x: kernels.gated_group_norm(x, x[0, 0], x[0, 0], x),
    "scale_heads": lambda x: kernels.scale_heads(x, x[..., 0]),
    "rotate_heads": lambda x: kernels.rotate_heads(x, x, x[..., 0, :2].detach())[0],
    "weighted_swiglu": lambda x: kernels.weighted_swiglu(x[0, :, 0], x[0, :, 0, 0]),
    "collect_rows": lambda x: kernels.collect_rows(x[0], torch.arange(6), torch.arange(6)[:, None], x[0, :, 0, :1]),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_refused_where_the_incoming_gradient_is_a_constant(name: str) -> None:
    """And elsewhere; one backward pass is none of these."""
    x = torch.randn(1, 6, 1, 4).mul_(0.3).requires_grad_()
    torch.autograd.grad(CALLS[name](x).sum(), x)
    for loss in (CALLS[name](x).sum(), CALLS[name](x).square().sum()):
        with pytest.raises(RuntimeError, match=r"differentiated again .*\n  why: .*\n  try: .*=reference"):
            torch.autograd.grad(loss, x, create_graph=True)


def test_what_is_asked_for_instead_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINEAR_MOE_KERNELS", "reference")
    x = torch.randn(1, 3, 1, 2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(CALLS["diag_decay"], (x,))


def test_no_kernel_takes_the_one_of_torch() -> None:
    folder = Path(kernels.__file__).parent
    assert not [
        path for path in folder.rglob("*.py") if "torch.autograd.function import once" in path.read_text()
    ]
