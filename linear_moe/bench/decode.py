"""``python -m linear_moe.bench decode``: time per token and memory of decoding at ever later positions.

Linear layers, a hybrid and softmax attention, with random weights. Positions are measured from near to far
(:mod:`linear_moe.bench.decoding`), until the memory or the minutes are used up; every row is on disk at once. What a
CPU is not meant for is refused before torch or Megatron is imported.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from linear_moe.bench import decode_report
from linear_moe.bench.configurations import SOFTMAX, models_of, refuse_less
from linear_moe.bench.plans import plan_model
from linear_moe.bench.record import Record, Row, say, versions
from linear_moe.inference.quiet import no_messages
from linear_moe.launch.cluster import cuda_device_count
from linear_moe.launch.errors import PreflightError
from linear_moe.launch.plan import RunPlan
from linear_moe.model.families import FAMILIES, ModelSize, estimate_parameters

MODELS = ["softmax", "gated_deltanet:LLLN", "gated_deltanet:L"]
POSITIONS = [1024 * 2**i for i in range(8)]
"""1k to 128k."""
SETTINGS = ("family", "size", "batch", "dtype", "no_graph")
"""Rows with others are others."""

MOST_ON_CPU = 2e9
"""Bytes of weights and keys that a CPU can be asked for: each step reads them, in a second or more."""
ON_CPU = "--size tiny --dtype float32 --batch 2 --positions 1024 8192 --steps 8"
"""Words of a command that a CPU is done with in a minute."""


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
        for name, plan in plans.items():
            refuse_on_cpu(name, plan, args, positions[-1])
    except ValueError as error:
        sys.stderr.write(f"linear_moe.bench: {error}\n")
        return 2
    with no_messages():  # what Megatron does not find, a dozen times
        from linear_moe.bench import decoding
    until = time.monotonic() + 60 * args.minutes
    record = Record(
        args.output / "decode.json", shlex.join(["python", "-m", "linear_moe.bench", "decode", *argv])
    )
    about: Row = {name: getattr(args, name) for name in SETTINGS}
    about |= {
        "device": decoding.device_name(),
        "versions": versions("torch", "triton", "nvidia-cuda-nvcc", "megatron-core"),
    }
    for name, plan in plans.items():
        for row in decoding.measure(name, plan, positions, args, until):
            say(f"{name} at {row['position']}: {decode_report.line(row)}")
            record.put({**about, **row}, ("model", "position", *SETTINGS))
        decode_report.write(record)
        decoding.free()
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


def refuse_on_cpu(name: str, plan: RunPlan, args: argparse.Namespace, position: int) -> None:
    """PreflightError for a model or a cache that no CPU is meant for: memory ends, or the day."""
    weights, _ = estimate_parameters(plan.size, plan.kinds, plan.padded_vocab_size)
    keys = plan.kinds.count(SOFTMAX) * kept_per_token(plan.size) * args.batch * position
    held = (weights + keys) * (2 if args.dtype == "bfloat16" else 4)
    if cuda_device_count() == 0 and held > MOST_ON_CPU:
        raise PreflightError(
            f"{name} of {args.family} {plan.size_name} at batch {args.batch} and position {position} is too much "
            f"without a CUDA device.",
            f"weights and keys are about {held / 1e9:.0f} GB, which every step reads; a CPU is asked for "
            f"{MOST_ON_CPU / 1e9:.0f} at most.",
            f"python -m linear_moe.bench decode --family {args.family} {ON_CPU}",
        )


def kept_per_token(size: ModelSize) -> int:
    """Numbers that the cache of a softmax layer holds of each token."""
    if size.has_latent_attention:
        return (size.kv_lora_rank or 0) + (size.qk_pos_emb_head_dim or 0)
    return 2 * size.num_query_groups * size.kv_channels
