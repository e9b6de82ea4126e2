"""What tests of fused scans on a CUDA device share: limits, sizes, errors against the token loop, CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from scan_cases import PACKED, Inputs, results
from torch import Tensor
from triton_segment_cases import comparable
from triton_segment_cases import results as segment_results

from linear_moe import kernels
from linear_moe.kernels import reference

RMS = {torch.float32: (1e-5, 1e-5), torch.float16: (1e-3, 1e-3), torch.bfloat16: (3e-3, 5.5e-3)}
"""Of outputs and states, and of gradients."""
OF_DELTA_RULES = {**RMS, torch.bfloat16: (4e-3, 6e-3)}
"""What is written is rounded, too."""
OF_SCALED_OUTPUTS = 4e-3
"""bfloat16's, where single elements decay: q and k are rounded once more. docs/kernels.md has more of it."""
LAYOUTS = {
    "rows": dict(batch=40, num_heads=8, groups=8, num_tokens=70),
    "segments": dict(batch=1, num_tokens=1100),
    "packed": dict(num_tokens=230, cu_seqlens=PACKED),
}
DIMS = [(128, 128), (64, 64), (128, 256), (256, 128), (100, 48), (9, 3)]


def on_gpu(inputs: Inputs) -> Inputs:
    return Inputs(inputs.op, {name: x.cuda() for name, x in inputs.tensors.items()}, inputs.scale)


def fused_errors(inputs: Inputs, dtype: torch.dtype) -> dict[str, float]:
    """Relative RMS errors of backend ``triton`` on the GPU against the token loop in float64 on equal values."""
    inputs = inputs.to(dtype)
    for name in {"log_decay", "log_decay_v", "bonus"} & inputs.tensors.keys():
        inputs.tensors[name] = inputs.tensors[name].float()
    found = results(on_gpu(inputs), kernels, dtype)
    truth = results(inputs.to(torch.float64), reference, dtype)
    difference = {name: (found[name].cpu().double() - x.double()).norm() for name, x in truth.items()}
    return {name: (difference[name] / x.double().norm().clamp(min=1e-30)).item() for name, x in truth.items()}


def check_errors(inputs: Inputs, errors: dict[str, float], dtype: torch.dtype) -> None:
    of_outputs, of_gradients = (RMS if inputs.op == "diag_decay" else OF_DELTA_RULES)[dtype]
    log_decay = inputs.tensors.get("log_decay_v", inputs.tensors.get("log_decay"))
    if dtype == torch.bfloat16 and log_decay is not None and log_decay.ndim == 4:
        of_outputs = OF_SCALED_OUTPUTS
    assert all(e <= (of_gradients if n.startswith("grad") else of_outputs) for n, e in errors.items()), errors


def check_fused(inputs: Inputs, dtype: torch.dtype, more: float = 1.0) -> None:
    errors = fused_errors(inputs, dtype)
    check_errors(inputs, {name: error / more for name, error in errors.items()}, dtype)


def more_of(num_keys: int) -> float:
    """Of sums of few terms less cancels: 9 by 3 had up to 0.0062 of outputs and 0.0075 of gradients on an H100."""
    return 1.6 if num_keys < 16 else 1.0


def check_segment(inputs: Inputs, dtype: torch.dtype, more: float = 1.0) -> None:
    """Relative RMS errors of segments and their gradients; what is left of a memory is measured against the identity.

    But for diagonal decays, gradients in half precision are a sum of two, by way of the memory and of its decay.
    """
    inputs = inputs.to(dtype)
    for name in {"log_decay", "log_decay_v"} & inputs.tensors.keys():
        inputs.tensors[name] = inputs.tensors[name].float()
    found = segment_results(on_gpu(inputs), kernels)
    truth = segment_results(inputs.to(torch.float64), reference)
    errors = {}
    for name, x in truth.items():
        f, t = comparable(name, found[name].cpu().double()), comparable(name, x)
        errors[name] = ((f - t).norm() / t.norm().clamp(min=1e-30)).item() / more
    of_outputs, of_gradients = RMS[dtype]
    if dtype == torch.bfloat16 and inputs.op != "diag_decay":
        of_outputs, of_gradients = OF_SCALED_OUTPUTS, 8e-3
    assert all(e <= (of_gradients if n.startswith("grad") else of_outputs) for n, e in errors.items()), errors


def captured(step: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
    """What a replay of ``step`` in a CUDA graph computes; it must have run before, and be compiled."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    found = [x.clone() for x in found]  # out of the memory of the graph
    torch.cuda.synchronize()
    return found


@contextmanager
def never_waiting() -> Iterator[None]:
    """What waits for the device fails."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
