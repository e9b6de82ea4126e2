"""The experts of one layer of MODEL_SIZE=A0.3B, forward and backward: in grouped GEMMs, in a loop, and as if dense.

    PYTHONPATH=. python benchmarks/experts.py results.json          on a GPU: half a minute
    PYTHONPATH=. python benchmarks/experts.py --rows 512            anywhere, to see that it runs

grouped   what trains: two grouped products and the gated unit; gradients in bfloat16.
looped    one expert after the other, with the numbers of their tokens on the host already, which Megatron's
          ``SequentialMLP`` waits for.
dense     one product in the place of each grouped one, of as many FLOPs: every token through the same weight.

Tokens are 32,768, with 8 of 64 experts each, unevenly. ``products`` leaves the gated unit out. Milliseconds, medians.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from linear_moe.bench.record import commit, versions
from linear_moe.kernels import weighted_swiglu
from linear_moe.kernels.grouped_linear import can_group, grouped_linear, looped_linear

EXPERTS, HIDDEN, WIDTH = 64, 1024, 896
Product = Callable[[Tensor, Tensor], Tensor]


def median(run: Callable[[], object], calls: int = 10) -> float:
    """Milliseconds between two marks on the device, or of the host's clock."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    for _ in range(3):
        run()
    times = []
    for _ in range(calls):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[calls // 2]


def experts(product: Product, x: Tensor, weights: Sequence[Tensor], probs: Tensor) -> None:
    """One pass forward and one backward."""
    y = product(weighted_swiglu(product(x, weights[0]), probs), weights[1])
    torch.autograd.grad(y, [x, *weights], x.detach())


def products(product: Product, given: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Likewise, of products alone: of inputs, a weight, and gradients of the outputs."""
    for x, weight, up in given:
        torch.autograd.grad(product(x, weight), [x, weight], up)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", nargs="?", type=Path)
    parser.add_argument("--rows", type=int, default=32768 * 8, help="tokens times experts of each")
    asked = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    draw = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        x = torch.randn(*shape, device=device, generator=draw, dtype=torch.float32).mul_(0.02)
        return x.to(torch.bfloat16).requires_grad_()

    x, inner, up = (normal(asked.rows, n) for n in (HIDDEN, WIDTH, 2 * WIDTH))
    weights = normal(EXPERTS, 2 * WIDTH, HIDDEN), normal(EXPERTS, HIDDEN, WIDTH)
    one = normal(2 * WIDTH, HIDDEN), normal(HIDDEN, WIDTH)
    probs = torch.rand(asked.rows, device=device, generator=draw)
    choice = torch.randn(EXPERTS, device=device, generator=draw).mul_(0.3).softmax(0)
    counts_E = torch.multinomial(choice, asked.rows, replacement=True, generator=draw).bincount(
        minlength=EXPERTS
    )
    ends, counts = counts_E.cumsum(0, dtype=torch.int32), counts_E.tolist()
    whole: dict[str, tuple[Product, Sequence[Tensor]]] = {
        "looped": (lambda x, weight: looped_linear(x, weight, counts), weights),
        "dense": (F.linear, one),
    }
    if can_group(x, *weights):
        whole = {"grouped": (lambda x, weight: grouped_linear(x, weight, ends), weights), **whole}
    found: dict[str, dict[str, float]] = {}
    for name, (product, own) in whole.items():
        pairs = [(x, own[0], up.detach()), (inner, own[1], x.detach())]
        alone = median(partial(products, product, pairs))
        found[name] = {
            "experts": median(partial(experts, product, x, own, probs)),
            "products": alone,
            "products, TFLOP/s": 6 * asked.rows * 3 * HIDDEN * WIDTH / alone / 1e9,
        }
    record = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "versions": versions("torch", "triton"),
        "rows": asked.rows,
        "most rows of an expert over the mean": max(counts) * EXPERTS / asked.rows,
        "milliseconds": found,
    }
    text = json.dumps(record, indent=1) + "\n"
    print(text, end="")
    if asked.output:
        asked.output.write_text(text)


if __name__ == "__main__":
    main()
