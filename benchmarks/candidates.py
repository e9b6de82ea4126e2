# mypy: allow-untyped-defs
"""Kernels that might take the place of shipped ones, timed beside them in one run on one GPU; nothing uses them.

    PYTHONPATH=. python benchmarks/candidates.py results.json          on a GPU: some minutes
    TRITON_INTERPRET=1 PYTHONPATH=. python benchmarks/candidates.py --check    right or not, anywhere

loss      both passes of the cross entropy in one program a row, the second one backwards: what the first one read last
          may still be in the L2 cache. Shipped: two kernels, which read every logit from memory twice.
gradient  weight gradients of experts, added to float32 sums by the GEMM itself. Shipped: ``grouped_mm`` writes
          bfloat16, which is then read and added.
runs      other runs, blocks and look-ahead of the short convolution, forward and backward, than those shipped.

Letters: M tokens, V logits of a row; E experts, O and I sizes of outputs and inputs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from linear_moe.bench.kernels.measures import median
from linear_moe.kernels import assembler, conv_and_split, cross_entropy_
from linear_moe.kernels.triton import short_conv

LOSS = [
    dict(BLOCK=block, num_warps=warps) for block, warps in ((8192, 16), (16384, 32), (8192, 32), (4096, 8))
]
GRADIENT = [
    dict(BO=BO, BI=BI, BM=BM, num_warps=warps, num_stages=stages)
    for (BO, BI, warps), BM, stages in itertools.product(((128, 128, 4), (128, 256, 8)), (32, 64), (3, 4))
    if (BO + BI) * BM * 2 * stages <= 220 * 1024
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


@triton.jit
def gradient_kernel(
    dy, x, ends, total, O: tl.constexpr, I: tl.constexpr,  # noqa: E741
    BO: tl.constexpr, BI: tl.constexpr, BM: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """``total`` ``[E, O, I]`` (+)= dy^T x over each expert's tokens. Grid: tiles, those of one expert together."""
    tiles_I: tl.constexpr = (I + BI - 1) // BI
    tiles: tl.constexpr = tiles_I * ((O + BO - 1) // BO)
    expert, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    first = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    last = tl.load(ends + expert)
    i_O = tile // tiles_I * BO + tl.arange(0, BO)
    i_I = tile % tiles_I * BI + tl.arange(0, BI)
    i_M = tl.arange(0, BM)
    m_O, m_I = (i_O < O) | (O % BO == 0), (i_I < I) | (I % BI == 0)
    dy += (first + i_M).to(tl.int64)[:, None] * O + i_O[None, :]
    x += (first + i_M).to(tl.int64)[:, None] * I + i_I[None, :]
    total += expert.to(tl.int64) * (O * I) + i_O[:, None] * I + i_I[None, :]
    m = m_O[:, None] & m_I[None, :]
    if ADD:  # before the loop: after it, registers would be too few
        b_sum = tl.load(total, mask=m, other=0.0)
    else:
        b_sum = tl.zeros([BO, BI], tl.float32)
    for block in range(tl.cdiv(last - first, BM)):
        m_M = (block * BM + i_M < last - first)[:, None]
        b_dy = tl.load(dy, mask=m_M & m_O[None, :], other=0.0)
        b_x = tl.load(x, mask=m_M & m_I[None, :], other=0.0)
        b_sum = tl.dot(tl.trans(b_dy), b_x, b_sum)
        dy += BM * O
        x += BM * I
    tl.store(total, b_sum, mask=m)


def one_pass_(logits: Tensor, labels: Tensor, weight: Tensor, **how: Any) -> Tensor:
    losses = logits.new_empty(len(logits), dtype=torch.float32)
    one_pass_kernel[(len(logits),)](logits, labels, weight, losses, logits.shape[1], logits.stride(0), **how)
    return losses


def add_gradient_(total: Tensor, dy: Tensor, x: Tensor, ends: Tensor, add: bool, **how: Any) -> None:
    E, O, I = total.shape  # noqa: E741
    tiles = triton.cdiv(O, how["BO"]) * triton.cdiv(I, how["BI"])
    gradient_kernel[(E * tiles,)](dy, x, ends, total, O, I, ADD=add, **how)


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


def timed(run: Callable[[], object]) -> str:
    """Milliseconds, and of what."""
    milliseconds, what = median(run)
    return f"{milliseconds:.3f} {what}"


def timed_loss(sizes: tuple[int, int]) -> dict[str, str]:
    logits, labels, weight = loss_inputs("cuda", *sizes)
    found = {"shipped": timed(lambda: cross_entropy_(logits, labels, weight))}
    for how in LOSS:
        run = lambda how=how: one_pass_(logits, labels, weight, **how)  # noqa: E731
        found[str(how)] = timed(run)
    return found


def timed_gradient(sizes: tuple[int, ...]) -> dict[str, str]:
    total, dy, x, ends = gradient_inputs("cuda", *sizes)

    def shipped(add: bool) -> Callable[[], object]:
        def run() -> None:
            grad = F.grouped_mm(dy.t(), x, offs=ends)
            total.add_(grad) if add else total.copy_(grad)

        return run

    found = {f"shipped, {name}": timed(shipped(add)) for name, add in (("written", False), ("added", True))}
    for how, (name, add) in itertools.product(GRADIENT, (("written", False), ("added", True))):
        run = lambda how=how, add=add: add_gradient_(total, dy, x, ends, add, **how)  # noqa: E731
        found[f"{how}, {name}"] = timed(run)
    return found


def timed_runs(tokens: int, model: str) -> dict[str, str]:
    """Milliseconds forward, and of both passes."""
    groups, widths, channels = CONVOLVED[model]
    normal = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    x, weight = normal(1, tokens, groups, sum(widths)), normal(groups, channels, 4)
    found = {}
    for how in RUNS:
        with mock.patch.multiple(short_conv, **how):
            run = lambda: conv_and_split(x, weight, widths=widths, activation="silu")  # noqa: E731
            found[f"{how}, forward"] = timed(run)
            leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
            parts = conv_and_split(*leaves, widths=widths, activation="silu")[:-1]
            grads = [torch.randn_like(part) for part in parts]

            def both() -> object:
                # In one run, since a graph cannot record a backward pass whose forward pass was not recorded.
                parts = conv_and_split(*leaves, widths=widths, activation="silu")[:-1]  # noqa: B023
                return torch.autograd.grad(parts, leaves, grads)  # noqa: B023

            found[f"{how}, both passes"] = timed(both)
    return found


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
    wrong = []
    for how in LOSS:
        wrong += report("loss", how, loss_errors(device, (5, 20011), how), 5e-3)
    for how in GRADIENT if device == "cuda" else GRADIENT[:2]:
        wrong += report("gradient", how, gradient_errors(device, (4, 250, 136, 264), how), 1e-5)
    if asked.check or wrong:
        parser.exit(bool(wrong), f"wrong: {wrong}\n" if wrong else "")
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "milliseconds": {},
    }
    tables: dict[str, Callable[[], dict[str, str]]] = {
        **{
            f"short convolution of {model}, 32768 tokens": partial(timed_runs, 32768, model)
            for model in CONVOLVED
        },
        "loss of 4096 x 151936": lambda: timed_loss((4096, 151936)),
        "gradient of 64 x 1792 x 1024 over 262144 tokens": lambda: timed_gradient((64, 262144, 1792, 1024)),
        "gradient of 64 x 1024 x 896 over 262144 tokens": lambda: timed_gradient((64, 262144, 1024, 896)),
    }
    for name, table in tables.items():
        found["milliseconds"][name] = table()
        print(json.dumps({name: found["milliseconds"][name]}, indent=1), flush=True)
        if asked.output:
            asked.output.write_text(json.dumps(found, indent=1) + "\n")


def report(name: str, how: dict[str, int], errors: dict[str, float], limit: float) -> list[str]:
    """What is wrong."""
    print(name, how, errors, flush=True)
    return [f"{name} {how}"] if not max(errors.values()) <= limit else []


if __name__ == "__main__":
    main()
