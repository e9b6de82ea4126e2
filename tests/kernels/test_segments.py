"""Segments: what a run does to any memory, against the token loop and against their own algebra."""

from __future__ import annotations

import pytest
import torch
from scan_cases import DECAYS, OPS, PACKED, Chunked, Inputs, error, gradients, make, poison_empty
from torch import Tensor

from linear_moe.kernels import Segment, reference

EXACT = 1e-10
VARIANTS = [
    *[("diag_decay", decay, extra) for decay in DECAYS for extra in ("", "log_decay_v")],
    *[(op, decay, "") for op in ("delta_rule", "dplr_delta_rule") for decay in DECAYS],
]


@pytest.fixture(autouse=True)
def nan_in_fresh_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_empty(monkeypatch)


def parts(segment: Segment) -> list[Tensor]:
    return [x for x in (segment.state, segment.log_decay, segment.decay) if x is not None]


def with_gradients(inputs: Inputs, module: object) -> list[Tensor]:
    inputs = inputs.differentiable()
    used = {name: x for name, x in inputs.tensors.items() if x.requires_grad and name not in ("q", "state")}
    found = parts(inputs.segment(module))  # type: ignore[arg-type]
    return [*found, *gradients(found, used).values()]


@pytest.mark.parametrize(("op", "decay", "extra"), VARIANTS)
@pytest.mark.parametrize("layout", ["rows", "packed"])
def test_equals_definition_and_carries(op: str, decay: str, extra: str, layout: str) -> None:
    packed = dict(cu_seqlens=PACKED, num_tokens=PACKED[-1]) if layout == "packed" else {}
    inputs = make(op, decay, extra=extra, **packed)
    found, truth = with_gradients(inputs, Chunked), with_gradients(inputs, reference)
    assert len(found) == len(truth)
    assert all(error(f, t) <= EXACT for f, t in zip(found, truth))
    _, final = inputs.run(reference)
    assert error(inputs.segment(Chunked).carry(inputs.tensors["state"]), final) <= EXACT


@pytest.mark.parametrize(("op", "decay", "extra"), VARIANTS)
def test_runs_compose(op: str, decay: str, extra: str) -> None:
    inputs = make(op, decay, extra=extra, num_tokens=150)
    whole = inputs.segment(Chunked)

    def run(start: int, end: int) -> Segment:
        constant = ("state",) if decay != "head" else ("state", "log_decay")
        cut = {n: x if n in constant else x[:, start:end] for n, x in inputs.tensors.items()}
        return Inputs(op, cut).segment(Chunked)

    a, b, c = run(0, 64), run(64, 65), run(65, 150)
    for composed in (a.then(b).then(c), a.then(b.then(c))):
        assert len(parts(composed)) == len(parts(whole))
        assert all(error(f, t) <= EXACT for f, t in zip(parts(composed), parts(whole)))


def test_empty_documents_are_the_identity() -> None:
    memory = torch.randn(3, 4, 6, 5, dtype=torch.float64)
    for op in OPS:
        segment = make(op, "vector", num_tokens=10, cu_seqlens=(0, 0, 10, 10)).segment(Chunked)
        carried = segment.carry(memory)
        assert torch.equal(carried[[0, 2]], memory[[0, 2]])
        assert not torch.equal(carried[1], memory[1])


@pytest.mark.parametrize("layout", ["rows", "packed"])
@pytest.mark.parametrize("op", OPS)
def test_total_forgetting(op: str, layout: str) -> None:
    packed = dict(cu_seqlens=PACKED) if layout == "packed" else {}
    inputs = make(op, "vector", num_tokens=200, **packed)
    inputs.tensors["log_decay"][:, 80:90] = float("-inf")
    segment = inputs.segment(Chunked)
    _, final = inputs.run(reference)
    assert error(segment.carry(inputs.tensors["state"]), final) <= EXACT
    assert torch.isfinite(segment.then(segment).state).all()


def test_dtypes() -> None:
    segment = make("diag_decay", "vector").to(torch.bfloat16).segment(Chunked)
    assert segment.state.dtype == segment.log_decay.dtype == torch.float32
    for op in ("delta_rule", "dplr_delta_rule"):
        segment = make(op, "none").to(torch.bfloat16).segment(Chunked)
        assert segment.state.dtype == segment.decay.dtype == torch.float32
