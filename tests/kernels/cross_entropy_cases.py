"""Cases of the cross entropy; run_interpreted.py runs the fused passes in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from scan_cases import error
from torch import Tensor

from linear_moe.kernels import reference

CASES: dict[str, dict[str, Any]] = {
    "few": dict(tokens=3, logits=5),
    "many": dict(tokens=4, logits=1500),
    "far apart": dict(tokens=4, logits=300, spread=60.0),
    "one block": dict(tokens=2, logits=256),
    "none in the first block": dict(tokens=3, logits=600, forbidden=300),
    "strided labels and weights": dict(tokens=5, logits=20, strided=True),
    "labels of other slices": dict(tokens=5, logits=20, labels=[20, -1, 0, 19, -20]),
}


def make(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels, and weights of which one is zero."""
    case = CASES[name]
    generator = torch.Generator().manual_seed(len(name))
    size = case["tokens"], case["logits"]
    logits = torch.randn(size, generator=generator, dtype=torch.float64) * case.get("spread", 3.0)
    forbidden = case.get("forbidden", 0)
    logits[:, :forbidden] = float("-inf")
    labels = torch.randint(forbidden, size[1], size[:1], generator=generator)
    labels = torch.tensor(case.get("labels", labels.tolist()))
    weight = torch.rand(size[0], generator=generator, dtype=torch.float64)
    weight[1] = 0.0
    weight = weight.to(dtype)
    if case.get("strided"):
        labels, weight = (torch.stack([x, x + 1], -1)[:, 0] for x in (labels, weight))
    return logits.to(dtype), labels, weight


def errors(name: str, run: Callable[..., Tensor], dtype: torch.dtype) -> list[float]:
    """Of losses and gradients, against PyTorch's in float64 on equal values."""
    logits, labels, weight = make(name, dtype)
    exact = logits.double().clone()
    elsewhere, first = (labels < 0) | (labels >= logits.shape[1]), exact[:, 0].clone()
    truth = reference.cross_entropy_(exact, labels.masked_fill(elsewhere, 0), weight.double())
    truth = torch.where(elsewhere, truth + first, truth)  # of these tokens nothing is picked here
    exact[:, 0] += elsewhere * weight
    version = logits._version
    found = run(logits, labels, weight)
    assert logits._version > version, "autograd was not told"
    return [error(found.double(), truth), error(logits.double(), exact)]


def fused(name: str) -> list[float]:
    """With several blocks in a row."""
    from linear_moe.kernels.triton import cross_entropy

    with mock.patch.object(cross_entropy, "BLOCK", 256):
        return errors(name, cross_entropy.cross_entropy_, torch.float32)
