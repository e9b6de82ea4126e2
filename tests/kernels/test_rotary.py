"""Rotary positions: torch path and fused kernel (interpreted) against products of complex numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from rotary_cases import CASES, errors, make
from run_interpreted import errors_of_picked
from torch import Tensor

from linear_moe.kernels import rotary, rotate_heads

EXACT, SINGLE = 1e-12, 3e-7


@pytest.fixture(scope="module")
def fused_errors(request: pytest.FixtureRequest) -> Callable[[str], list[float]]:
    return errors_of_picked(request, "rotary_cases")


@pytest.mark.parametrize("name", CASES)
def test_torch_path_is_exact(name: str) -> None:
    assert max(errors(name, rotary.rotate_heads, torch.float64)) <= EXACT


@pytest.mark.parametrize("name", CASES)
def test_fused_kernel(name: str, fused_errors: Callable[[str], list[float]]) -> None:
    assert len(fused_errors(name)) == 5 and max(fused_errors(name)) <= SINGLE


@pytest.mark.parametrize("name", CASES)
def test_torch_path_is_megatrons(name: str) -> None:
    """Bit for bit, in float32."""
    given = make(name, torch.float32)
    freqs_TB1R = torch.cat([given["angles"]] * 2, -1).transpose(0, 1).unsqueeze(2)
    for x, found in zip((given["q"], given["k"]), rotate_heads(**given), strict=True):
        expected = _apply_rotary_pos_emb_bshd(x.transpose(0, 1), freqs_TB1R, mscale=given.get("scale", 1.0))
        assert torch.equal(found.transpose(0, 1), expected)


def test_training_keeps_angles_only() -> None:
    inputs, kept = make("whole heads", torch.float32), list[Tensor]()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        rotate_heads(**inputs)
    assert [x.data_ptr() for x in kept] == [inputs["angles"].data_ptr()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q=torch.zeros(1, 2, 12)), r"q has shape \[1, 2, 12\]"),
        (dict(q=torch.zeros(1, 2, 3, 4).int()), "q is torch.int32"),
        (dict(k=torch.zeros(1, 2, 3, 6)), r"k has shape \[1, 2, 3, 6\]\n.*\n  try: a tensor \[1, 2, G, 4\]"),
        (dict(k=torch.zeros(1, 3, 3, 4)), r"k has shape \[1, 3, 3, 4\]"),
        (dict(angles=torch.zeros(1, 2, 3)), r"angles has shape \[1, 2, 3\]"),
        (dict(angles=torch.zeros(2, 2)), r"angles has shape \[2, 2\]"),
        (dict(angles=torch.zeros(1, 2, 0)), r"angles has shape \[1, 2, 0\]"),
        (dict(angles=torch.zeros(1, 2, 2, requires_grad=True)), "angles requires a gradient"),
    ],
)
def test_refuses_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    x = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match=message):
        rotate_heads(**{**dict(q=x, k=x, angles=torch.zeros(1, 2, 2)), **change})
