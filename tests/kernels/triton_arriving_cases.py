"""Cases of fused scans whose memory is on its way, which run_interpreted.py runs in Triton's interpreter.

Their truth is the same call with the memory at hand: the same kernels, the same bits.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from fused_scans import ONE, configured, one_projection
from interpreted_cases import Cases, Errors
from scan_cases import Inputs, gradients, make
from torch import Tensor

from linear_moe import kernels

CASES = Cases()
case, fused = CASES.add, CASES.run
ARRIVES = "the memory arrives"
SHORT = (0, 0, 1, 18, 18, 50, 50)
SUMS, LOCAL, SOLVE, SCAN = "sums_kernel", "local_state_kernel", "solve_kernel", "forward_kernel"
PLAN, SCALE, SCALED = "plan_kernel", "scale_kernel", "scaled_scan_kernel"


def launched(inputs: Inputs, arrives: bool) -> tuple[dict[str, Tensor], list[str]]:
    """Outputs and every gradient, and the names of the kernels of the forward pass, in their order."""
    from triton.runtime.interpreter import InterpretedFunction

    leaves, names, run = inputs.differentiable(), [], InterpretedFunction.run
    state = leaves.tensors["state"]

    def record(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(kernel.__name__)
        return run(kernel, *args, **kwargs)

    def arrive() -> Tensor:
        names.append(ARRIVES)
        return state

    with mock.patch.object(InterpretedFunction, "run", record):
        o, final = leaves.run(kernels, state=arrive if arrives else state)
    of = {name: x for name, x in leaves.tensors.items() if x.requires_grad}
    return {"o": o, "final": final, **gradients([o, final], of)}, names


@case("head rows", "diag_decay", "head", (), num_tokens=40, **ONE)
@case("scalar rows", "diag_decay", "scalar", (SUMS,), num_tokens=40, strided=True, **ONE)
@case("none segments", "diag_decay", "none", (LOCAL,), num_tokens=150, processors=16, **ONE)
@case("scalar packed", "diag_decay", "scalar", (PLAN, SUMS, LOCAL), num_tokens=60, cu_seqlens=SHORT)
@case("vector rows", "diag_decay", "vector", (SCALE,), num_tokens=40, strided=True, **ONE)
@case("vector segments", "diag_decay", "vector", (SCALE, SCALED), num_tokens=150, processors=16, **ONE)
@case("bonus rows", "diag_decay", "vector", (SCALE,), extra="bonus", num_tokens=40, **ONE)
@case("values rows", "diag_decay", "none", (SCALE,), extra="log_decay_v", num_tokens=40, **ONE)
@case(
    "values packed",
    "diag_decay",
    "none",
    (PLAN, SCALE, SCALED),
    extra="log_decay_v",
    num_tokens=60,
    cu_seqlens=SHORT,
)
@case("delta none", "delta_rule", "none", (SOLVE,), num_tokens=40, strided=True, **ONE)
@case("delta scalar packed", "delta_rule", "scalar", (PLAN, SUMS, SOLVE), num_tokens=60, cu_seqlens=SHORT)
@case(
    "delta scalar pieces",
    "delta_rule",
    "scalar",
    (SUMS, SOLVE, SCAN, SCAN),
    num_tokens=100,
    processors=5,
    **ONE,
)
@case("delta vector", "delta_rule", "vector", ("solve_levels_kernel",), num_tokens=40, **ONE)
def same_bits(
    op: str, decay: str, before: tuple[str, ...], *, processors: int = 1, strided: bool = False, **sizes: Any
) -> Errors:
    """Nothing is computed twice, either, and ``before`` is what runs before the memory arrives."""
    inputs = make(op, decay, num_values=6, **sizes).to(torch.float32)
    if strided:
        one_projection(inputs.tensors)
    with configured(16, processors):
        truth, all_kernels = launched(inputs, arrives=False)
        found, names = launched(inputs, arrives=True)
    place = names.index(ARRIVES)
    assert tuple(names[:place]) == before, names
    assert names[:place] + names[place + 1 :] == all_kernels, (names, all_kernels)
    return {name: float(not torch.equal(found[name], value)) for name, value in truth.items()}
