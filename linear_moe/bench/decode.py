"""``python -m linear_moe.bench decode``: time per token and memory of decoding at ever later positions.

Linear layers, a hybrid and softmax attention, with random weights: the time of a step does not depend on what was
written, so a position is jumped to by setting how many tokens the cache holds. Steps are the product's own
(``linear_moe.inference.loop``): greedy, on a GPU one CUDA graph each. Positions are measured from near to far, until
the memory or the minutes are used up; every row is on disk at once.
"""

from __future__ import annotations

from linear_moe.training import cpu

if cpu.needed():
    cpu.activate()  # before Megatron looks for a device

import argparse
import gc
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from linear_moe.bench import decode_report
from linear_moe.bench.configurations import SOFTMAX, models_of, refuse_less
from linear_moe.bench.plans import plan_model
from linear_moe.bench.record import Record, Row, say, versions
from linear_moe.inference.decoder import Decoder
from linear_moe.inference.generate import LOOK_EVERY
from linear_moe.inference.load import LoadedModel, for_inference, join_single_process
from linear_moe.inference.loop import Loop
from linear_moe.inference.rebuild import single_process_arguments
from linear_moe.inference.sampling import Sampling
from linear_moe.launch.errors import PreflightError
from linear_moe.launch.megatron_args import training_arguments
from linear_moe.launch.plan import RunPlan
from linear_moe.model.builder import LinearMoEBuilder
from linear_moe.model.families import FAMILIES
from linear_moe.training import arguments

MODELS = ["softmax", "gated_deltanet:LLLN", "gated_deltanet:L"]
POSITIONS = [1024 * 2**i for i in range(8)]
"""1k to 128k."""
WARM = 3
"""Steps before the measured ones: one as it is, one captured, one replayed."""
SETTINGS = ("family", "size", "batch", "dtype", "no_graph")
"""Rows with others are others."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m linear_moe.bench decode",
        description="Measure decoding: milliseconds per token and memory at ever later positions.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--family", default="qwen2", choices=list(FAMILIES), help="model family")
    add("--size", default="A0.3B", help="model size")
    models = "softmax, or MIXER:PATTERN with L the mixer and N softmax"
    add("--models", nargs="+", default=MODELS, metavar="MODEL", help=models)
    add("--batch", type=int, default=16, help="rows")
    add("--positions", nargs="+", default=POSITIONS, metavar="P", help="tokens before the measured ones")
    add("--steps", type=int, default=32, help="measured steps at a position")
    add("--minutes", type=float, default=10.0, help="begin nothing after this")
    add("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the weights")
    add("--no-graph", action="store_true", help="steps as they are, for comparison")
    folder = Path("benchmarks", f"decode_{time.strftime('%Y-%m-%d')}")
    add("--output", type=Path, default=folder, help="folder of decode.json, decode.md and decode.png")
    return parser


def main(argv: Sequence[str]) -> int:
    """Measure every model and write the report; returns 0, or 2 for a mistake."""
    args = parser().parse_args(argv)
    try:
        positions = positions_of(args.positions)
        refuse_less("--batch", args.batch, 1, "rows", 16)
        refuse_less("--steps", args.steps, 1, "steps", 32)
        plans = {name: plan_of(name, args) for name in models_of(args.models)}
    except ValueError as error:
        sys.stderr.write(f"linear_moe.bench: {error}\n")
        return 2
    until = time.monotonic() + 60 * args.minutes
    record = Record(
        args.output / "decode.json", shlex.join(["python", "-m", "linear_moe.bench", "decode", *argv])
    )
    about: Row = {name: getattr(args, name) for name in SETTINGS}
    about |= {
        "device": "CPU" if cpu.is_active() else torch.cuda.get_device_name(),
        "versions": versions("torch", "triton", "megatron-core"),
    }
    for name, plan in plans.items():
        for row in measure(name, plan, positions, args, until):
            say(f"{name} at {row['position']}: {decode_report.line(row)}")
            record.put({**about, **row}, ("model", "position", *SETTINGS))
        decode_report.write(record)
        gc.collect()
        torch.cuda.empty_cache()
    for path in decode_report.write(record):
        say(f"wrote {path}")
    return 0


def positions_of(given: Sequence[str | int]) -> list[int]:
    """From near to far, of words or of a list with commas; PreflightError for one that is no number of tokens."""
    words = [word for word in ",".join(map(str, given)).split(",") if word]
    wrong = [word for word in words if not (word.isdecimal() and int(word))]
    if wrong or not words:
        raise PreflightError(
            f"--positions {wrong[0] if wrong else 'without a number'} is no position.",
            "it is how many tokens stand before the measured ones, 1 or more.",
            "--positions 1024 8192",
        )
    return sorted({int(word) for word in words})


def plan_of(name: str, args: argparse.Namespace) -> RunPlan:
    """Of a model by its name; PreflightError where there is no such mixer, pattern or size."""
    mixer, _, pattern = name.partition(":")
    if mixer == SOFTMAX:
        return plan_model(args.family, args.size, layer_type_list=pattern or "N")
    return plan_model(args.family, args.size, mixer, pattern or None)


def build(plan: RunPlan, dtype: torch.dtype) -> LoadedModel:
    """A model with random weights."""
    rows = plan.padded_vocab_size
    parsed = single_process_arguments(training_arguments(plan), padded_vocab_size=rows, dtype=dtype)
    parsed.perform_initialization = True
    config = arguments.model_config(parsed)
    join_single_process()
    from megatron.core.process_groups_config import ProcessGroupCollection

    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = LinearMoEBuilder(config).build_model(groups, pre_process=True, post_process=True)
    return LoadedModel(for_inference(model, dtype), None, config, 0, rows, None)


def measure(
    name: str, plan: RunPlan, positions: list[int], args: argparse.Namespace, until: float
) -> Iterator[Row]:
    """All positions of one model that memory and time allow."""
    loaded = build(plan, getattr(torch, args.dtype))
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
    reason = None
    for position in positions:
        row: Row = {"model": name, "position": position, "status": "ok"}
        if time.monotonic() > until:
            reason = reason or "the time was over"
        if reason is None:
            try:
                decoder.jump(position, room=each)
                loop.graph, loop.growths = None, -1  # every position is captured where its cache is
                row |= steps(loop, args.steps)
            except torch.cuda.OutOfMemoryError:
                reason = "out of memory"
        if reason is not None:
            yield row | {"status": "not begun", "error": reason}
            continue
        held = decoder.memory_size()
        yield row | {
            "graph": loop.graph is not None,
            "recurrent_bytes": held.recurrent,
            "kv_cache_bytes": held.kv_cache,
            "capacity": decoder.context.max_sequence_length,
            "allocated_over_weights_bytes": allocated() - weights,
        }


def steps(loop: Loop, count: int) -> dict[str, float]:
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
    """Until the device is done."""
    if not cpu.is_active():
        torch.cuda.synchronize()


def allocated() -> int:
    """Bytes on the device."""
    return 0 if cpu.is_active() else torch.cuda.memory_allocated()
