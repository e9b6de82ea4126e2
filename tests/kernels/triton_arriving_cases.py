"""Cases of fused scans whose memory is on its way, which run_interpreted.py runs in Triton's interpreter.

Their truth is the same call with the memory at hand: the same kernels, the same bits.

A case names the kernels that run before the memory arrives, and those that run after its gradient has left.
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
ARRIVES, LEAVES = "the memory arrives", "its gradient leaves"
SHORT = (0, 0, 1, 18, 18, 50, 50)
FEW = dict(groups=1, num_heads=1)


def launched(inputs: Inputs, arrives: bool) -> tuple[dict[str, Tensor], list[str]]:
    """Outputs and every gradient, and the names of all kernels in their order."""
    from triton.runtime.interpreter import InterpretedFunction

    leaves, names, run = inputs.differentiable(), [], InterpretedFunction.run
    state = leaves.tensors["state"]

    def record(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(kernel.__name__.removesuffix("_kernel"))
        return run(kernel, *args, **kwargs)

    def arrive() -> Tensor:
        names.append(ARRIVES)
        memory = state.clone()
        memory.register_hook(lambda grad: names.append(LEAVES))
        return memory

    with mock.patch.object(InterpretedFunction, "run", record):
        o, final = leaves.run(kernels, state=arrive if arrives else state)
        of = {name: x for name, x in leaves.tensors.items() if x.requires_grad}
        return {"o": o, "final": final, **gradients([o, final], of)}, names


DIAG, DIAG_VECTOR = (
    ("diag_scan", "diag_scan", "decay_gradient"),
    ("diag_scaled_scan", "diag_scaled_scan", "diag_combine"),
)


@case("head rows", "diag_decay", "head", (), DIAG, num_tokens=20, **ONE)
@case("scalar rows", "diag_decay", "scalar", ("decay_sums",), DIAG, num_tokens=20, strided=True, **ONE)
@case(
    "none segments",
    "diag_decay",
    "none",
    ("diag_local_state",),
    DIAG[:2],
    num_tokens=100,
    processors=16,
    **ONE,
)
@case(
    "scalar packed",
    "diag_decay",
    "scalar",
    ("layout_plan", "decay_sums", "diag_local_state"),
    DIAG,
    num_tokens=60,
    cu_seqlens=SHORT,
    **FEW,
)
@case("vector rows", "diag_decay", "vector", ("diag_scale",), DIAG_VECTOR, num_tokens=20, strided=True, **ONE)
@case(
    "vector segments",
    "diag_decay",
    "vector",
    ("diag_scale", "diag_scaled_scan"),
    DIAG_VECTOR,
    num_tokens=100,
    processors=16,
    **ONE,
)
@case("bonus rows", "diag_decay", "vector", ("diag_scale",), DIAG_VECTOR, extra="bonus", num_tokens=20, **ONE)
@case(
    "values rows",
    "diag_decay",
    "none",
    ("diag_scale",),
    DIAG_VECTOR,
    extra="log_decay_v",
    num_tokens=20,
    **ONE,
)
@case(
    "delta none",
    "delta_rule",
    "none",
    ("delta_solve",),
    ("delta_pairs", "delta_gradient"),
    num_tokens=20,
    strided=True,
    **ONE,
)
@case(
    "delta scalar packed",
    "delta_rule",
    "scalar",
    ("layout_plan", "decay_sums", "delta_solve"),
    ("delta_pairs", "delta_gradient"),
    num_tokens=60,
    cu_seqlens=SHORT,
    **FEW,
)
@case(
    "delta scalar pieces",
    "delta_rule",
    "scalar",
    ("decay_sums", "delta_solve", "delta_forward", "delta_forward"),
    ("delta_pairs", "delta_gradient"),
    num_tokens=70,
    processors=5,
    **ONE,
)
@case(
    "delta vector",
    "delta_rule",
    "vector",
    ("delta_solve_levels",),
    ("delta_vector_pairs", "delta_vector_gradient"),
    num_tokens=20,
    **ONE,
)
@case(
    "low rank packed",
    "dplr_delta_rule",
    "vector",
    ("layout_plan", "dplr_solve"),
    ("dplr_read", "dplr_pairs", "dplr_gradient"),
    num_tokens=60,
    cu_seqlens=SHORT,
    **FEW,
)
@case(
    "low rank pieces",
    "dplr_delta_rule",
    "vector",
    ("dplr_solve", "dplr_scan", "dplr_scan"),
    ("dplr_read", "dplr_pairs", "dplr_gradient"),
    num_tokens=70,
    processors=5,
    **ONE,
)
def same_bits(
    op: str,
    decay: str,
    before: tuple[str, ...],
    after: tuple[str, ...],
    *,
    processors: int = 1,
    strided: bool = False,
    **sizes: Any,
) -> Errors:
    """Nothing is computed twice, either."""
    inputs = make(op, decay, num_values=6, **sizes).to(torch.float32)
    if strided:
        one_projection(inputs.tensors)
    with configured(16, processors):
        truth, all_kernels = launched(inputs, arrives=False)
        found, names = launched(inputs, arrives=True)
    assert tuple(names[: names.index(ARRIVES)]) == before, names
    assert tuple(names[names.index(LEAVES) + 1 :]) == after, names
    assert [name for name in names if name not in (ARRIVES, LEAVES)] == all_kernels, (names, all_kernels)
    return {name: float(not torch.equal(found[name], value)) for name, value in truth.items()}
