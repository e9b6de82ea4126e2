# mypy: allow-untyped-defs
"""Kernels that might take the place of shipped ones, timed beside them in one run on one GPU; nothing uses them.

    PYTHONPATH=. python benchmarks/candidates.py results.json          on a GPU: a minute, most of it compilers
    TRITON_INTERPRET=1 PYTHONPATH=. python benchmarks/candidates.py --check    right or not, anywhere

loss      both passes of the cross entropy in one program a row, the second one backwards: what the first one read last
          may still be in the L2 cache. Shipped: two kernels, which read every logit from memory twice.
gradient  other tiles and stages of the kernel of experts' weight gradients than those shipped, beside what it took the
          place of: ``grouped_mm`` writes bfloat16, which is then read and added.
runs      other runs, blocks and look-ahead of the short convolution, forward and backward, than those shipped.

Times are the device's own: between two events around calls that take longer than their launch, and of the kernels in a
profile where autograd and its small launches take part. A table that fails is its error, and the others go on.

Letters: M tokens, V logits of a row; E experts, O and I sizes of outputs and inputs.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from triton.runtime import _async_compile
from triton.runtime.jit import JITFunction

from linear_moe.bench.breakdown import device_times
from linear_moe.kernels import assembler, conv_and_split, cross_entropy_, dispatch
from linear_moe.kernels.triton import short_conv, weight_grad

Run = Callable[[], object]
Calls = dict[str, Run]
Table = tuple[Callable[[], list[str]], Callable[[], Calls], Callable[[Run], float]]
"""What of its kernels is wrong, its calls, and how they are timed."""

LOSS = [
    dict(BLOCK=block, num_warps=warps) for block, warps in ((8192, 16), (16384, 32), (8192, 32), (4096, 8))
]
GRADIENT = [
    dict(BO=BO, BI=BI, BM=64, num_warps=warps, num_stages=stages)
    for BO, BI, warps, stages in ((128, 128, 4, 3), (128, 256, 8, 3), (128, 256, 8, 4), (256, 128, 8, 4))
]
SHIPPED = {name: getattr(short_conv, name) for name in ("RUN", "AHEAD", "BLOCK", "MOST_REGISTERS")}
RUNS = [
    SHIPPED | change
    for change in (
        {}, dict(RUN=64), dict(RUN=256), dict(RUN=512), dict(AHEAD=8, MOST_REGISTERS=168), dict(MOST_REGISTERS=168),
        dict(BLOCK=256, MOST_REGISTERS=255), dict(BLOCK=64, MOST_REGISTERS=80),
    )
]  # fmt: skip
CONVOLVED = {
    "gated_deltanet": (8, (128, 128, 128, 128, 1, 1), 384),
    "mamba2": (1, (2048, 128, 128, 2048, 32), 2304),
}
"""Groups, widths of a group's parts, and convolved channels of A0.3B."""


@triton.jit
def one_pass_kernel(logits, labels, weight, losses, num_logits, stride, BLOCK: tl.constexpr):
    """Loss of a row, which is overwritten by its gradient."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label, factor = tl.load(labels + row), tl.load(weight + row)
    i_B = tl.arange(0, BLOCK)
    largest, total = tl.full([BLOCK], float("-inf"), tl.float32), tl.zeros([BLOCK], tl.float32)
    blocks = tl.cdiv(num_logits, BLOCK)
    for block in range(blocks):  # every lane has a sum of its own: no exchange in the loop
        i_V = block * BLOCK + i_B
        b_x = tl.load(logits + i_V, mask=i_V < num_logits, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, b_x)
        base = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp(largest - base) + tl.exp(b_x - base)
        largest = larger
    top = tl.max(largest, 0)
    log_sum = top + tl.log(tl.sum(total * tl.exp(largest - top), 0))
    tl.store(losses + row, log_sum - tl.load(logits + label).to(tl.float32))
    tl.debug_barrier()  # the label's logit is read before it is overwritten
    for step in range(blocks):
        i_V = (blocks - 1 - step) * BLOCK + i_B
        b_x = tl.load(logits + i_V, mask=i_V < num_logits, other=float("-inf")).to(tl.float32)
        b_x = (tl.exp(b_x - log_sum) - tl.where(i_V == label, 1.0, 0.0)) * factor
        tl.store(logits + i_V, b_x.to(logits.dtype.element_ty), mask=i_V < num_logits)


def one_pass_(logits: Tensor, labels: Tensor, weight: Tensor, **how: Any) -> Tensor:
    losses = logits.new_empty(len(logits), dtype=torch.float32)
    one_pass_kernel[(len(logits),)](logits, labels, weight, losses, logits.shape[1], logits.stride(0), **how)
    return losses


def add_gradient_(total: Tensor, dy: Tensor, x: Tensor, ends: Tensor, add: bool, **how: Any) -> None:
    """By the package's kernel, cut in another way."""
    with mock.patch.object(weight_grad, "launch_options", lambda *sizes: how):
        weight_grad.grouped_weight_grad_(total, dy, x, ends, add)


def loss_inputs(device: str, M: int, V: int) -> tuple[Tensor, Tensor, Tensor]:
    labels = torch.randint(0, V, (M,), device=device)
    return torch.randn(M, V, device=device, dtype=torch.bfloat16), labels, torch.rand(M, device=device)


def gradient_inputs(device: str, E: int, M: int, O: int, I: int) -> tuple[Tensor, ...]:  # noqa: E741
    """Experts of uneven numbers of tokens, one of them without any."""
    ends = torch.rand(E - 1).sort().values.mul(M).int()
    ends[E // 2 :] = ends[E // 2 :].clamp(min=int(ends[E // 2 - 1]))
    ends = torch.cat([ends, torch.tensor([M], dtype=torch.int32)])
    ends[E // 2] = ends[E // 2 - 1]
    # The interpreter's products know no bfloat16.
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    normal = lambda *shape: torch.randn(*shape, device=device, dtype=dtype)  # noqa: E731
    return torch.zeros(E, O, I, device=device), normal(M, O), normal(M, I), ends.to(device)


def error(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth.double()).norm() / truth.double().norm())


def loss_errors(device: str, sizes: tuple[int, int], how: dict[str, int]) -> dict[str, float]:
    logits, labels, weight = loss_inputs(device, *sizes)
    exact = logits.double().requires_grad_()
    truth = F.cross_entropy(exact, labels, reduction="none")
    (truth * weight).sum().backward()
    found = one_pass_(logits, labels, weight, **how)
    assert exact.grad is not None
    return {"loss": error(found, truth.detach()), "gradient": error(logits, exact.grad)}


def gradient_errors(device: str, sizes: tuple[int, ...], how: dict[str, int]) -> dict[str, float]:
    total, dy, x, ends = gradient_inputs(device, *sizes)
    parts, numbers = (dy.double(), x.double()), ends.diff(prepend=ends.new_zeros(1)).tolist()
    truth = torch.stack([a.t() @ b for a, b in zip(parts[0].split(numbers), parts[1].split(numbers))])
    found = {}
    for add in (False, True):
        add_gradient_(total, dy, x, ends, add, **how)
        found["added" if add else "written"] = error(total, truth * (1 + add))
    return found


def timed(run: Run, calls: int = 10) -> float:
    """Milliseconds of a call that takes longer on the device than its launch does."""
    for _ in range(2):
        run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def timed_kernels(run: Run, calls: int = 20) -> float:
    """Milliseconds of a call's kernels, without what lies between them."""
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
    seconds = sum(seconds for _, seconds, _ in device_times(profiler, on_cpu=False))
    return 1e3 * seconds / calls


def loss_calls(sizes: tuple[int, int]) -> Calls:
    logits, labels, weight = loss_inputs("cuda", *sizes)
    calls: Calls = {"shipped": lambda: cross_entropy_(logits, labels, weight)}
    return calls | {str(how): partial(one_pass_, logits, labels, weight, **how) for how in LOSS}


def gradient_calls(sizes: tuple[int, ...]) -> Calls:
    total, dy, x, ends = gradient_inputs("cuda", *sizes)

    def in_torch(add: bool) -> None:
        grad = F.grouped_mm(dy.t(), x, offs=ends)
        total.add_(grad) if add else total.copy_(grad)

    calls: Calls = {"torch, the product alone": lambda: F.grouped_mm(dy.t(), x, offs=ends)}
    for name, add in (("written", False), ("added", True)):
        calls[f"torch, {name}"] = partial(in_torch, add)
        calls[f"shipped, {name}"] = partial(weight_grad.grouped_weight_grad_, total, dy, x, ends, add)
        for how in GRADIENT:
            calls[f"{how}, {name}"] = partial(add_gradient_, total, dy, x, ends, add, **how)
    return calls


def convolution_calls(tokens: int, model: str) -> Calls:
    groups, widths, channels = CONVOLVED[model]
    normal = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    x, weight = normal(1, tokens, groups, sum(widths)), normal(groups, channels, 4)
    leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
    grads = [normal(1, tokens, groups, width) for width in widths]

    def forward(*inputs: Tensor, how: dict[str, int]) -> tuple[Tensor, ...]:
        with mock.patch.multiple(short_conv, **how):
            return conv_and_split(*inputs, widths=widths, activation="silu")[: len(widths)]

    def both(how: dict[str, int]) -> object:
        parts = forward(*leaves, how=how)
        with mock.patch.multiple(short_conv, **how):
            return torch.autograd.grad(parts, leaves, grads)

    calls: Calls = {}
    for how in RUNS:
        calls[f"{how}, forward"] = partial(forward, x, weight, how=how)
        calls[f"{how}, both passes"] = partial(both, how)
    return calls


def compile_together(calls: Iterable[Run]) -> None:
    """All their kernels at the same time; nothing is launched. One that fails will say so when it is called."""
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return launch(self, *args, grid=grid, warmup=True, **kwargs)

    with ThreadPoolExecutor() as pool, _async_compile.AsyncCompileMode(pool, ignore_errors=True) as mode:
        everywhere = SimpleNamespace(get=lambda: mode)  # autograd launches from a thread of its own
        with (
            mock.patch.object(_async_compile, "active_mode", everywhere),
            mock.patch.object(JITFunction, "run", compile_only),
        ):
            for call in calls:
                with suppress(Exception):
                    call()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", nargs="?", type=Path)
    parser.add_argument("--check", action="store_true", help="errors of small calls only")
    asked = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and (why := assembler.obstacle()):  # these kernels do not go through the dispatch
        parser.error(why)
    if asked.check:
        wrong = wrong_losses(device) + wrong_gradients(device)
        parser.exit(bool(wrong), f"wrong: {wrong}\n" if wrong else "")
    # Without trials, which cannot be judged while nothing runs.
    os.environ[dispatch.ENVIRONMENT_VARIABLE] = "triton"
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "milliseconds": {},
    }
    for name, (check, make, milliseconds) in tables().items():
        times = found["milliseconds"][name] = {}
        try:
            if wrong := check():
                raise ArithmeticError(f"wrong: {wrong}")
            calls = make()
            compile_together(calls.values())
            for call, run in calls.items():
                times[call] = round(milliseconds(run), 4)
        except Exception:  # the others go on
            times["error"] = traceback.format_exc()
        print(json.dumps({name: times}, indent=1), flush=True)
        if asked.output:
            asked.output.write_text(json.dumps(found, indent=1) + "\n")
    parser.exit(any("error" in times for times in found["milliseconds"].values()))


def tables() -> dict[str, Table]:
    """By name."""
    found: dict[str, Table] = {
        "loss of 4096 x 151936": (partial(wrong_losses, "cuda"), partial(loss_calls, (4096, 151936)), timed)
    }
    convolutions: dict[str, Table] = {
        f"short convolution of {model}, 32768 tokens": (
            list,
            partial(convolution_calls, 32768, model),
            timed_kernels,
        )
        for model in CONVOLVED
    }
    for O, I in ((1792, 1024), (1024, 896)):  # noqa: E741
        check, make = partial(wrong_gradients, "cuda"), partial(gradient_calls, (64, 262144, O, I))
        found[f"gradient of 64 x {O} x {I} over 262144 tokens"] = check, make, timed
    return found | convolutions


def wrong_losses(device: str) -> list[str]:
    """Of small calls."""
    if device == "cuda":
        compile_together([partial(one_pass_, *loss_inputs(device, 5, 20011), **how) for how in LOSS])
    return [x for how in LOSS for x in report("loss", how, loss_errors(device, (5, 20011), how), limit=5e-3)]


def wrong_gradients(device: str) -> list[str]:
    """Of small calls."""
    sizes, cuts = (4, 250, 136, 264), GRADIENT[::2]
    if device == "cuda":
        given = gradient_inputs(device, *sizes)
        compile_together(
            [partial(add_gradient_, *given, add, **how) for how in cuts for add in (False, True)]
        )
    return [
        x for how in cuts for x in report("gradient", how, gradient_errors(device, sizes, how), limit=1e-5)
    ]


def report(name: str, how: dict[str, int], errors: dict[str, float], limit: float) -> list[str]:
    """What is wrong."""
    print(name, how, errors, flush=True)
    return [f"{name} {how}"] if not max(errors.values()) <= limit else []


if __name__ == "__main__":
    main()
