"""Every mixer on a CUDA device, float32 and bfloat16, against its token loop in float64 on the CPU."""

import dataclasses
from functools import cache

import pytest
import torch
from torch import Tensor

from linear_moe.lsm import MixerState
from tests.contract.cases import MIXERS, Inputs, gradients, make, outputs
from tests.contract.loop import loop

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
DOCUMENTS = torch.tensor([0, 0, 1, 3, 70, 130])
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 5e-2}
"""Of the root mean square of the error, relative to that of the truth."""


@cache
def truth(name: str, dtype: torch.dtype) -> tuple[Inputs, dict[str, Tensor]]:
    """Inputs rounded to ``dtype``, and what the definition makes of them."""
    inputs = make(name, batch=1, tokens=130, runs=len(DOCUMENTS) - 1, dtype=dtype)
    if "based" in name:
        # They divide by sums of weights, which may be near 0 in a memory that no keys made.
        for memory in inputs.state.memory:
            memory.data.zero_()
    exact = moved(inputs, "cpu", lambda x: torch.float64)
    found = outputs(loop(exact, DOCUMENTS))
    return inputs, found | gradients(found, exact.tensors())


def moved(inputs: Inputs, device: str, dtype) -> Inputs:
    def move(x):
        if x is None or not x.is_floating_point():
            return None if x is None else x.to(device)
        return x.detach().to(device, dtype(x)).requires_grad_()

    state = inputs.state
    return dataclasses.replace(
        inputs,
        x=move(inputs.x),
        others={key: move(x) for key, x in inputs.others.items()},
        w={key: move(x) for key, x in inputs.w.items()},
        state=MixerState(
            tuple(move(m) for m in state.memory),
            move(state.conv),
            move(state.group_conv),
            length=move(state.length),
        ),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MIXERS)
def test_mix_is_the_loop(name, dtype):
    """Started, packed; every gradient. Memories and decays are float32."""
    inputs, expected = truth(name, dtype)
    here = moved(inputs, DEVICE, lambda x: x.dtype)
    gates, decays = here.mixer.gates, []

    def watched(*arguments):
        gated = gates(*arguments)
        decays.extend(x.dtype for key, x in gated.items() if key.startswith("log_decay"))
        return gated

    here.mixer.gates = watched
    try:
        found = outputs(here.mix(cu_seqlens=DOCUMENTS.to(DEVICE)))
    finally:
        del here.mixer.gates
    assert set(decays) <= {torch.float32}
    assert all(x.dtype == torch.float32 for key, x in found.items() if "memory" in key)
    leaves = here.tensors()
    drawn = gradients_like(found, leaves)
    errors = {}
    for key, true in expected.items():
        if name == "mom_rebased" and key.startswith("grad") and dtype == torch.bfloat16:
            continue  # its memories' keys round here, and their first tokens are divided by the square of q . k
        if "based" in name and key.startswith("grad memory"):
            continue
        got = (found | drawn)[key].detach().double().cpu()
        scale = true.double().square().mean().sqrt().clamp(min=1e-3)
        errors[key] = ((got - true.double()).square().mean().sqrt() / scale).item()
    worst = max(errors, key=lambda key: errors[key])
    tolerance = TOLERANCE[dtype] * (30 if name == "mom_rebased" else 1)
    assert errors[worst] <= tolerance, (worst, errors[worst])


def gradients_like(found: dict[str, Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """:func:`~tests.contract.cases.gradients` from the same random numbers, which are drawn on the CPU."""
    on_cpu = {key: x.cpu() if x.requires_grad else x for key, x in found.items()}
    return gradients(on_cpu, leaves)


@pytest.mark.parametrize("name", MIXERS)
def test_nothing_waits_for_the_device(name):
    """Forward and backward, packed, in bfloat16: nothing is read on the host."""
    inputs = make(name, batch=1, tokens=130, runs=len(DOCUMENTS) - 1, dtype=torch.bfloat16)
    here, cu_seqlens = moved(inputs, DEVICE, lambda x: x.dtype), DOCUMENTS.to(DEVICE)

    def step() -> None:
        o, state = here.mix(cu_seqlens=cu_seqlens)
        (o.float().sum() + sum(m.sum() for m in state.memory)).backward()

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
