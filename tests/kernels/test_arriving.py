"""Memories that are on their way: operations start before they wait, and compute the same bits."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from interpreted_cases import Errors
from run_interpreted import errors_of_picked
from scan_cases import DECAYS, OPS, PACKED, Inputs, error, gradients, make
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton_arriving_cases import CASES

from linear_moe import kernels
from linear_moe.kernels import reference
from linear_moe.kernels.arriving import Arriving, meanwhile, states_of


@pytest.fixture(scope="module")
def errors_of(request: pytest.FixtureRequest) -> Callable[[str], Errors]:
    return errors_of_picked(request, "triton_arriving_cases")


@pytest.mark.parametrize("name", CASES)
def test_fused_kernels_start_first(name: str, errors_of: Callable[[str], Errors]) -> None:
    errors = errors_of(name)
    assert errors and not any(errors.values()), errors


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.baddbmm)
        return func(*args, **(kwargs or {}))


def outcome(inputs: Inputs, o: Tensor, final: Tensor) -> dict[str, Tensor]:
    leaves = {name: x for name, x in inputs.tensors.items() if x.requires_grad}
    return {"o": o, "final": final, **gradients([o, final], leaves)}


NUM_CHUNKS = 12
"""At most, of 200 tokens or of PACKED."""
EXTRAS = [(op, decay, "") for op in OPS for decay in DECAYS]
EXTRAS += [("diag_decay", "vector", "bonus"), ("diag_decay", "scalar", "log_decay_v")]


@pytest.mark.parametrize("op, decay, extra", EXTRAS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_chunked_torch_starts_first(
    op: str, decay: str, extra: str, packed: bool, dtype: torch.dtype
) -> None:
    """Half of the products or more run before it arrives; backward some after its gradient has left; none twice."""
    inputs = make(op, decay, extra=extra, num_tokens=200, cu_seqlens=PACKED if packed else None).to(dtype)
    leaves, again = inputs.differentiable(), inputs.differentiable()
    state, seen = leaves.tensors["state"], []

    def arrive() -> Tensor:
        assert torch.is_grad_enabled()
        seen.append(products.count)
        memory = state.clone()  # as from a fold, whose graph is this
        memory.register_hook(lambda grad: seen.append(products.count))
        return memory

    with Products() as products:
        found = leaves.run(kernels, state=arrive)
        forward = products.count
        assert found[0].grad_fn.early.take() is None  # type: ignore[union-attr]  # not kept until the backward pass
        found_of = outcome(leaves, *found)
    with Products() as all_products:
        truth = again.run(kernels)
        assert all_products.count == forward
        truth_of = outcome(again, *truth)
    arrived, left = seen
    loop = 2 * NUM_CHUNKS  # one step from chunk to chunk is a product, of dense decays
    assert forward <= 2 * arrived + loop
    assert left + 4 <= products.count == all_products.count
    assert all(torch.equal(found_of[name], x) for name, x in truth_of.items())


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "device, backend",
    [("cpu", "chunked")]
    + [pytest.param("cuda", name, marks=pytest.mark.gpu) for name in ("chunked", "triton")],
)
def test_the_gradient_of_the_memory_is_first(
    monkeypatch: pytest.MonkeyPatch, op: str, device: str, backend: str
) -> None:
    """Also where autograd has a thread for each device."""
    monkeypatch.setenv("LINEAR_MOE_KERNELS", backend)
    inputs = make(op, "vector", num_tokens=200, num_keys=32, num_values=32).to(torch.bfloat16)
    inputs = Inputs(op, {name: x.to(device) for name, x in inputs.tensors.items()})
    leaves, again = inputs.differentiable(), inputs.differentiable()
    happened = []

    def arrive() -> Tensor:
        memory = leaves.tensors["state"].clone()
        memory.register_hook(lambda grad: happened.append("memory"))
        return memory

    leaves.tensors["v"].register_hook(lambda grad: happened.append("tokens"))
    found, truth = outcome(leaves, *leaves.run(kernels, state=arrive)), outcome(again, *again.run(kernels))
    assert happened == ["memory", "tokens"]
    assert all(torch.equal(found[name], x) for name, x in truth.items())


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("named", ["", "reference"])
def test_one_token_and_token_loops_wait(monkeypatch: pytest.MonkeyPatch, op: str, named: str) -> None:
    """What has nothing to start is given the memory itself."""
    monkeypatch.setenv("LINEAR_MOE_KERNELS", named)
    inputs = make(op, "scalar", num_tokens=3 if named else 1)
    state = inputs.tensors["state"]
    found, truth = inputs.run(kernels, state=lambda: state), inputs.run(reference)
    assert all(error(x, y) < 1e-14 for x, y in zip(found, truth, strict=True))


def test_a_memory_is_checked_when_it_arrives() -> None:
    inputs = make("delta_rule")
    with pytest.raises(ValueError, match=r"state has shape \[2, 3\]\n  why: .*\n  try: "):
        inputs.run(kernels, state=lambda: torch.zeros(2, 3))


def test_looking_at_an_arriving_memory_waits_once() -> None:
    asked = []
    memory = Arriving(2, lambda: asked.append(1) or [torch.zeros(1), torch.ones(1)])
    first, second = states_of(memory, 2)
    assert bool(memory) and len(memory) == 2 and not asked
    assert callable(first) and callable(second)
    assert second() == 1 and first() == 0
    keys, values = memory
    assert keys == 0 and values == 1 and len(asked) == 1
    assert states_of(None, 2) == (None, None) and states_of((), 1) == (None,)
    assert states_of((keys,))[0] is keys


def test_what_is_begun_early_has_no_graph() -> None:
    """And tokens pass as they are: those without a gradient stay without one, and without autograd nothing is done."""
    x, y = torch.randn(2, requires_grad=True), torch.randn(2)
    begun_with_grad = []

    def begin(*tokens: Tensor | None) -> None:
        begun_with_grad.append(torch.is_grad_enabled())

    _, tokens, early = meanwhile(lambda: y, begin, (y, x, None))
    assert early is not None and [t is not None and t.requires_grad for t in tokens] == [False, True, False]
    with torch.no_grad():
        _, same, _ = meanwhile(lambda: y, begin, (x, y))
    assert same[0] is x and begun_with_grad == [False, False]


def test_a_memory_that_is_here_lets_go_of_what_was_sent() -> None:
    class Sent:
        pass

    sent = Sent()
    held = weakref.ref(sent)
    memory = Arriving(1, lambda sent=sent: [torch.zeros(1)])  # type: ignore[misc]
    del sent
    assert held() is not None and torch.equal(memory[0], torch.zeros(1))
    assert held() is None
