"""``python -m linear_moe.bench step``: speed and memory of training steps, over mixers and sequence lengths.

Every configuration is a run of its own, started as a run script starts it (the launcher's variables and checks,
torchrun, Megatron's ``pretrain()``), on random tokens and without checkpoints. Its figures are those of its
``metrics.jsonl``: medians over the steps after warm-up. One that fails, by too little memory for example, is reported,
and the next goes on. Results are written after each; the same command, given again, measures what is missing.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from linear_moe.bench import report
from linear_moe.bench.configurations import TRACE, Configuration, Sweep, plan_of, sweep
from linear_moe.bench.record import say
from linear_moe.bench.running import measure
from linear_moe.launch.cluster import cuda_device_count
from linear_moe.launch.errors import PreflightError
from linear_moe.launch.plan import RunPlan
from linear_moe.model.families import estimate_parameters

MODELS = ["gla", "gated_deltanet", "mamba2", "gated_deltanet:LLLN", "softmax"]
SEQ_LENS = [2048, 4096, 8192, 16384, 32768, 65536]
LEAST = 20
"""Seconds that must be left of the time budget for another configuration to begin."""

MOST_ON_CPU = 1e13
"""FLOP of a step that a CPU can be asked for: a minute or more, at some 1e11 a second."""
ON_CPU = "--size tiny --tokens 1024 --seq-lens 256 1024 --models gla softmax --set PR=fp32"
"""Words of a command that a CPU is done with in two minutes."""

Measure = Callable[[Configuration, Path, float], dict[str, Any]]
"""Measures a configuration, in a folder, within so many seconds."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m linear_moe.bench step",
        description="Measure training steps: tokens/s, TFLOP/s, MFU and peak memory over mixers and sequence lengths.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--family", default="qwen2", help="family of the model (BASE_MODEL)")
    add("--size", default="A0.3B", help="its size (MODEL_SIZE)")
    models = (
        "LA_MODULE[:LAYER_TYPE_LIST] of each model; softmax is the baseline that others are compared with"
    )
    add("--models", nargs="+", default=MODELS, metavar="MODEL", help=models)
    add(
        "--seq-lens",
        nargs="+",
        type=int,
        default=SEQ_LENS,
        metavar="S",
        help="tokens of a sequence (SEQ_LEN)",
    )
    add("--tokens", type=int, default=65536, help="tokens of a step, the same at every length")
    add(
        "--micro-tokens",
        type=int,
        help="tokens of a micro batch; default: all of a step. Never less than a sequence",
    )
    add("--steps", type=int, default=20, help="steps that the medians are over")
    add("--warm-up", type=int, default=5, help="steps before them")
    add("--set", nargs="+", default=[], metavar="VARIABLE=VALUE", help="variables of the run script: AC=none")
    vary = "more configurations, each with these variables changed: 'USE_GEMM=false' 'AC=full'; first length only"
    add("--vary", nargs="+", default=[], metavar="VARIABLES", help=vary)
    add(
        "--profile",
        action="store_true",
        help="then profile more steps: time by kind of kernel, when nothing runs, and a trace",
    )
    add("--minutes", type=float, help="begin nothing after so long, and stop what runs; default: no limit")
    folder = Path("benchmarks", f"step_{time.strftime('%Y-%m-%d')}")
    add("--output", type=Path, default=folder, help="folder of results.json, results.md and the plot")
    add("--again", action="store_true", help="measure anew what the folder has already")
    return parser


def main(argv: list[str], measure: Measure = measure) -> int:
    """Measure what is missing and write the report; returns 0, or 1 when a configuration failed, or 2 for a mistake."""
    began = time.time()
    given = parser().parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="linear_moe_bench_") as folder:
        try:
            configurations = sweep(Sweep.of(given))
            for configuration in configurations:  # every mistake before the first process
                plan = plan_of(configuration, cuda_device_count(), OUTPUT_BASEPATH=folder)
                refuse_on_cpu(plan, len(configurations))
        except ValueError as error:
            sys.stderr.write(f"linear_moe.bench: {error}\n")
            return 2
        command = shlex.join(["python", "-m", "linear_moe.bench", "step", *argv])
        results = report.Results(given.output, command, given.again)
        deadline = began + 60 * given.minutes if given.minutes else float("inf")
        _measure_all(configurations, results, measure, Path(folder), deadline)
    for path in report.write(results):
        say(f"wrote {path}")
    return int(any(row["status"] == "failed" for row in results.of(configurations)))


def refuse_on_cpu(plan: RunPlan, configurations: int) -> None:
    """PreflightError for a step that no CPU is meant for: memory ends, or the day, and only a GPU's figure counts."""
    s = plan.settings
    _, active = estimate_parameters(plan.size, plan.kinds, plan.padded_vocab_size)
    pairs = plan.kinds.count("softmax") * plan.size.num_attention_heads * plan.size.kv_channels * s.seq_len
    flops = 6 * (active + pairs) * s.tokens_per_step
    if plan.on_cpu and flops > MOST_ON_CPU:
        raise PreflightError(
            f"{plan.family.name} {plan.size_name} with {s.tokens_per_step} tokens a step (SEQ_LEN={s.seq_len}) is too "
            f"much without a CUDA device.",
            f"a step is about {flops:.0e} FLOP, and this would be {s.iterations} of them in each of {configurations} "
            f"configuration(s); a CPU is asked for {MOST_ON_CPU:.0e} at most.",
            f"python -m linear_moe.bench step --family {plan.family.name} {ON_CPU}",
        )


def _measure_all(
    configurations: list[Configuration],
    results: report.Results,
    measure: Measure,
    folder: Path,
    deadline: float,
) -> None:
    for i, configuration in enumerate(configurations):
        if results.has(configuration):
            continue
        where = f"[{i + 1}/{len(configurations)}] {configuration.title}"
        if time.time() + LEAST > deadline:
            results.add(configuration, {"status": "not begun", "error": "the time was over"})
            say(f"{where}: not begun, the time is over")
            continue
        say(f"{where} ...")
        place = folder / str(i)
        place.mkdir()
        found = measure(configuration, place, deadline - time.time())
        results.add(configuration, found)
        if found["status"] == "failed" and (place / "log").exists():
            shutil.copy(place / "log", results.folder / f"failed_{configuration.slug}.log")
        if (place / TRACE).exists():
            shutil.copy(place / TRACE, results.folder / f"{configuration.slug}_{TRACE}")
        say(f"{where}: {report.line(found)}")
