"""Seconds per token and memory of decoding at ever later positions: linear layers, a hybrid and softmax attention.

Random weights in bfloat16: the time of a step does not depend on what was written, so a position is jumped to by
setting how many tokens the cache holds. Steps are the product's own (``linear_moe.inference.loop``): greedy, on a GPU
one CUDA graph each. Positions are measured from near to far, until the memory or the minutes are used up.

    PYTHONPATH=. python benchmarks/decode.py --output benchmarks/decode_h100.json --minutes 8
"""

from __future__ import annotations

from linear_moe.training import cpu

if cpu.needed():
    cpu.activate()  # before Megatron looks for a device

import argparse
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from linear_moe.inference.decoder import Decoder
from linear_moe.inference.generate import LOOK_EVERY
from linear_moe.inference.load import LoadedModel, join_single_process
from linear_moe.inference.loop import Loop
from linear_moe.inference.rebuild import single_process_arguments
from linear_moe.inference.sampling import Sampling
from linear_moe.model.builder import LinearMoEBuilder
from linear_moe.model.families import FAMILIES, megatron_arguments, padded_vocab_size
from linear_moe.training import arguments

POSITIONS = [1024 * 2**i for i in range(8)]
"""1k to 128k."""
WARM = 3
"""Steps before the measured ones: one as it is, one captured, one replayed."""


def main() -> None:
    args = parse()
    until = time.monotonic() + 60 * args.minutes
    results: list[dict[str, Any]] = []
    for name in args.models.split(","):
        results += measure(name, args, until)
        gc.collect()
        torch.cuda.empty_cache()
        report = describe(args, results)
        Path(args.output).write_text(json.dumps(report, indent=1) + "\n")
    print(table(results))
    if report["crossings"]:
        print("faster than softmax from", report["crossings"])
    draw(results, args, Path(args.output).with_suffix(".png"))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", required=True, metavar="FILE.json", help="results; a picture is put beside them")
    add("--family", default="qwen2", help="model family")
    add("--size", default="A0.3B", help="model size")
    models = "softmax,gated_deltanet:LLLN,gated_deltanet:L"
    add("--models", default=models, help="softmax, or MIXER:PATTERN with L the mixer and N softmax")
    add("--batch", type=int, default=16, help="rows")
    add("--positions", default=",".join(map(str, POSITIONS)), help="tokens before the measured ones")
    add("--steps", type=int, default=32, help="measured steps at a position")
    add("--minutes", type=float, default=10.0, help="begin nothing after this")
    add("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the weights")
    add("--no-graph", action="store_true", help="steps as they are, for comparison")
    return parser.parse_args()


def build(name: str, args: argparse.Namespace) -> LoadedModel:
    """A model with random weights."""
    family = FAMILIES[args.family]
    size = family.sizes[args.size]
    mixer, _, pattern = name.partition(":")
    symbols = (pattern or "N") * size.num_layers if mixer == "softmax" else pattern * size.num_layers
    kinds = ["softmax" if symbol == "N" else mixer for symbol in symbols[: size.num_layers]]
    rows = padded_vocab_size(size.vocab_size + size.extra_vocab_size)
    words = megatron_arguments(family, size)
    words += ["--layer-kinds", ",".join(kinds), "--seq-length", "64", "--micro-batch-size", "1"]
    words += ["--train-iters", "1", "--lr", "1e-4", "--mock-data", "--num-workers", "0"]
    words += ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(rows - 1)]
    dtype = getattr(torch, args.dtype)
    parsed = single_process_arguments(words, padded_vocab_size=rows, dtype=dtype)
    parsed.perform_initialization = True
    config = arguments.model_config(parsed)
    join_single_process()
    from megatron.core.process_groups_config import ProcessGroupCollection

    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = LinearMoEBuilder(config).build_model(groups, pre_process=True, post_process=True)
    return LoadedModel(model.to(dtype).eval().requires_grad_(False), None, config, 0, rows, None)


def measure(name: str, args: argparse.Namespace, until: float) -> list[dict[str, Any]]:
    """All positions of one model that memory and time allow."""
    positions = [int(position) for position in args.positions.split(",")]
    loaded = build(name, args)
    weights = allocated()
    each = WARM + args.steps
    decoder = Decoder(loaded.model, args.batch, positions[-1] + each + 1)
    loop = Loop(
        decoder,
        Sampling(),
        seeds=range(args.batch),
        ends=(),
        steps=1 + each * len(positions),
        vocab_size=loaded.vocab_size,
        graph=False if args.no_graph else None,
    )
    loop.start(decoder.read([[1]] * args.batch))
    found: list[dict[str, Any]] = []
    reason = None
    for position in positions:
        row: dict[str, Any] = {"model": name, "position": position}
        found.append(row)
        if time.monotonic() > until:
            reason = reason or "the minutes are used up"
        if reason is not None:
            row["skipped"] = reason
            continue
        try:
            decoder.jump(position, room=each)
            loop.graph, loop.growths = None, -1  # every position is captured where its cache is
            row |= steps(loop, args.steps)
        except torch.cuda.OutOfMemoryError:
            row["skipped"] = reason = "out of memory"
            continue
        held = decoder.memory_size()
        row |= {
            "graph": loop.graph is not None,
            "recurrent_bytes": held.recurrent,
            "kv_cache_bytes": held.kv_cache,
            "capacity": decoder.context.max_sequence_length,
            "allocated_over_weights_bytes": allocated() - weights,
        }
        print(json.dumps(row), flush=True)
    return found


def steps(loop: Loop, count: int) -> dict[str, Any]:
    """Milliseconds per step, of blocks between two looks of the host, after the warm-up."""
    for _ in range(WARM):
        loop.next()
    wait()
    times = []
    for _ in range(max(1, count // LOOK_EVERY)):
        start = time.perf_counter()
        for _ in range(min(count, LOOK_EVERY)):
            loop.next()
        loop.noted(0, 1)  # waits, as a look does
        wait()
        times.append(1e3 * (time.perf_counter() - start) / min(count, LOOK_EVERY))
    return {"ms_per_token": statistics.median(times), "ms_fastest": min(times), "ms_slowest": max(times)}


def wait() -> None:
    if not cpu.is_active():
        torch.cuda.synchronize()


def allocated() -> int:
    return 0 if cpu.is_active() else torch.cuda.memory_allocated()


def describe(args: argparse.Namespace, results: list[dict[str, Any]]) -> dict[str, Any]:
    """What was measured where, and from which position on each model is faster than softmax."""
    device = "CPU" if cpu.is_active() else torch.cuda.get_device_name()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": device,
        "torch": torch.__version__,
        "settings": vars(args),
        "crossings": crossings(results),
        "results": results,
    }


def crossings(results: list[dict[str, Any]]) -> dict[str, int | None]:
    """The first measured position from which a model is faster than softmax; None: nowhere."""
    times = {(row["model"], row["position"]): row.get("ms_per_token") for row in results}
    names = dict.fromkeys(row["model"] for row in results)
    found: dict[str, int | None] = {}
    for name in names:
        if name == "softmax" or not any(row["model"] == "softmax" for row in results):
            continue
        places = sorted(position for model, position in times if model == name)
        faster = [p for p in places if (times[name, p] or 1e9) < (times.get(("softmax", p)) or 1e9)]
        slower = [p for p in places if p not in faster]
        later = [p for p in faster if not slower or p > max(slower)]
        found[name] = later[0] if later else None
    return found


def table(results: list[dict[str, Any]]) -> str:
    """In Markdown: milliseconds per token and MiB beside the weights that the sequences hold."""
    names = list(dict.fromkeys(row["model"] for row in results))
    lines = ["| position | " + " | ".join(f"{name}: ms, MiB" for name in names) + " |"]
    lines.append("|---" * (len(names) + 1) + "|")
    for position in dict.fromkeys(row["position"] for row in results):
        cells = []
        for name in names:
            row = next((r for r in results if (r["model"], r["position"]) == (name, position)), {})
            if "ms_per_token" in row:
                held = (row["recurrent_bytes"] + row["kv_cache_bytes"]) / 2**20
                cells.append(f"{row['ms_per_token']:.2f}, {held:.1f}")
            else:
                cells.append(row.get("skipped", ""))
        lines.append(f"| {position} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(results: list[dict[str, Any]], args: argparse.Namespace, output: Path) -> None:
    """Both against the position."""
    if not any("ms_per_token" in row for row in results):
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name in dict.fromkeys(row["model"] for row in results):
        rows = [row for row in results if row["model"] == name and "ms_per_token" in row]
        places = [row["position"] for row in rows]
        left.plot(places, [row["ms_per_token"] for row in rows], marker="o", label=name)
        held = [(row["recurrent_bytes"] + row["kv_cache_bytes"]) / 2**30 for row in rows]
        right.plot(places, held, marker="o", label=name)
    left.set(ylabel="ms per token", ylim=(0, None), title=f"{args.size}, batch {args.batch}")
    right.set(ylabel="GiB of states and keys", yscale="log", title="memory of the sequences")
    for axes in (left, right):
        axes.set(xlabel="position", xscale="log")
        axes.set_xscale("log", base=2)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(output, dpi=150)


if __name__ == "__main__":
    main()
