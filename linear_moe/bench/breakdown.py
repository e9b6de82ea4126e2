"""Where a step's time goes: kernels of a profile, added up by what they are for.

A kernel is known by its name alone, and names say what a kernel computes, not which layer asked for it: element-wise
work of a mixer and of the experts is one row.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import profile

OURS = "linear_moe's kernels"
KINDS = {
    "communication": r"nccl|gloo|c10d",
    "softmax attention": r"flash|fmha|sdpa|scaled_dot_product|attention",
    "grouped matrix products (experts)": r"group",
    "matrix products": r"gemm|gemv|nvjet|cutlass|xmma|cublas|\b(mm|bmm|addmm|addbmm|baddbmm)\b",
    "optimizer": r"multi_tensor|adam|foreach|lpnorm|l2norm",
    "cross entropy, softmax": r"softmax|cross_?entropy|nll|logsumexp",
    "norms": r"layer_?norm|rms_?norm|gammabeta",
    "sorting, gathering, scattering": r"sort|radix|topk|index|gather|scatter|permut|cumsum|scan|histogram|bincount"
    r"|embedding|\btake|\broll|masked|nonzero|unique",
    "copies and casts": r"copy|memcpy|memset|clone|contiguous|\bcat\b|catarray|fill|zero|_to_\b|\bto\b",
    "reductions": r"reduce|\bsum\b|\bmean\b|\bmax\b|\bmin\b",
    "element-wise": r"elementwise|vectorized|triton_|\b(mul|add|sub|div|exp|neg|silu|sigmoid|where|pow|sqrt|rsqrt)_?\b",
}
"""Kinds of kernels by patterns of their names; the first that fits."""

OTHER = "other"


def kind_of(name: str) -> str:
    """What a kernel is for."""
    if name in _our_kernels():
        return OURS
    found = (kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE))
    return next(found, OTHER)


@cache
def _our_kernels() -> frozenset[str]:
    """Names of the package's Triton kernels, from their sources."""
    sources = (Path(__file__).parents[1] / "kernels" / "triton").glob("*.py")
    kernel = re.compile(r"^@triton\.jit.*\n(?:@.*\n)*def (\w+)\(", re.MULTILINE)
    return frozenset(name for source in sources for name in kernel.findall(source.read_text()))


def device_times(profiler: profile, on_cpu: bool) -> list[tuple[str, float, int]]:
    """Name, seconds and launches of all that ran on the device; operators and their own time where that is the CPU."""
    found = []
    for event in profiler.key_averages():
        if getattr(event, "is_user_annotation", False):
            continue  # a range around other events
        if on_cpu:
            found.append((event.key, event.self_cpu_time_total / 1e6, event.count))
        elif event.device_type == DeviceType.CUDA:
            found.append((event.key, event.self_device_time_total / 1e6, event.count))
    return found


def device_spans(profiler: profile) -> list[tuple[str, float, float]]:
    """Name, begin and end in seconds of all that ran on a GPU."""
    return [
        (event.name, event.time_range.start / 1e6, event.time_range.end / 1e6)
        for event in profiler.events() or ()
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]


PAUSES = {"under 5 us": 5e-6, "5 to 50 us": 5e-5, "50 to 500 us": 5e-4, "longer": float("inf")}
"""Upper ends, in seconds. Under 5 us is what lies between any two kernels; longer ones wait for the host."""


def pauses(spans: Iterable[tuple[str, float, float]], steps: int, top: int = 30) -> dict[str, Any]:
    """When nothing ran on any stream between two spans: of one step, by length and by place.

    The first step begins on an idle device and is left out: as many spans as a step has.
    """
    lengths = {name: [0.0, 0.0] for name in PAUSES}
    places: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    last, busy_until = "", float("inf")
    in_order = sorted(spans, key=lambda span: span[1])
    counted = max(1, steps - 1)
    for name, begin, end in in_order[len(in_order) - len(in_order) * counted // steps :]:
        if (pause := begin - busy_until) > 0:
            length = next(name for name, limit in PAUSES.items() if pause < limit)
            for sums in (lengths[length], places[last, name]):
                sums[0] += pause / counted
                sums[1] += 1 / counted
        if busy_until == float("inf") or end > busy_until:
            last, busy_until = name, end
    longest = sorted(places.items(), key=lambda item: -item[1][0])[:top]
    return {
        "lengths": {name: {"seconds": s, "times": n} for name, (s, n) in lengths.items()},
        "places": [
            {"after": after[:200], "before": before[:200], "seconds": s, "times": n}
            for (after, before), (s, n) in longest
        ],
    }


def breakdown(times: Iterable[tuple[str, float, int]], steps: int, top: int = 30) -> dict[str, Any]:
    """Seconds and launches of one step by kind of kernel, and its longest kernels, from those of several steps."""
    kinds: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    rows = sorted(times, key=lambda row: -row[1])
    for name, seconds, launches in rows:
        of_kind = kinds[kind_of(name)]
        of_kind[0] += seconds / steps
        of_kind[1] += launches / steps
    largest_first = sorted(kinds.items(), key=lambda item: -item[1][0])
    return {
        "kinds": {kind: {"seconds": s, "launches": n} for kind, (s, n) in largest_first},
        "kernels": [
            {
                "name": name[:200],
                "kind": kind_of(name),
                "seconds": seconds / steps,
                "launches": launches / steps,
            }
            for name, seconds, launches in rows[:top]
        ],
    }
