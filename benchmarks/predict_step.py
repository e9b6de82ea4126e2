"""Where the time of a training step would go on one H100: predicted on any machine, not measured.

Every operation of a step as ``python -m linear_moe.bench step`` runs it (the launcher's plan, Megatron's own train
step, fused kernels) is noted with the bytes and the FLOPs it takes, at its real shapes and without memory
(``predict/``). An operation takes the longer of its bytes over BANDWIDTH and its FLOPs over a rate, and LAUNCH.

    python benchmarks/predict_step.py [MODEL ...] [--seq-len 2048] [--micro-tokens 32768] [--set AC=none] [--ops 40]

Writes a table of milliseconds by part, and what the host takes to launch them. A model takes ten seconds. What caches
save, what kernels lose and what the allocator rounds is not in it: it orders what is worth work.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import re
import sys
import tempfile
import warnings
from collections import defaultdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

MODELS = ["gla", "gated_deltanet", "mamba2", "gated_deltanet:LLLN", "softmax"]
BANDWIDTH = 3.0e12
"""Bytes per second: 90 % of an H100's."""
PRODUCTS, GROUPED, ATTENTION, CHUNKS, SINGLE = 700e12, 640e12, 500e12, 250e12, 50e12
"""FLOP/s of matrix products, those of experts (642 measured), softmax attention, Triton's of chunks, float32."""
LAUNCH = 2.5e-6
"""Seconds that the device takes for a kernel that does nothing."""
DATASHEET = 989e12
ON_HOST = {"operation": 4e-6, "launch": 4e-6, "triton": 20e-6}
"""Seconds of the host for each operation of torch, each kernel, and on top of that for each of Triton's."""

PARTS = {
    "experts: grouped GEMM": r"grouped_linear|weight_grad|model/experts",
    "experts: SwiGLU": r"swiglu",
    "experts: permutation": r"rows\.py|routing\.py|local_dispatcher",
    "router": r"moe/|model/router|routes\.py",
    "rotary positions": r"rope_utils|rotary",
    "softmax attention": r"attention|rope",
    "projections": r"tensor_parallel/layers|mixer_projections|mixer_layer|column_linear",
    "short convolution": r"short_conv|conv\.py|conv_input",
    "scan": r"triton/(diag|delta|dplr|decay|states|segment|chunk)",
    "norm and gate of outputs": r"gated_norm|group_norm|skip_norm|lsm/output",
    "gates and splits of mixers": r"lsm/|scaled|log_decay|bounded_decay|lerp|edit_keys|random\.py",
    "norms": r"model/norm|triton/rms_norm",
    "residual stream": r"fused_bias_dropout|several readers",
    "output loss": r"output_loss|cross_entropy|pretrain.py:loss",
    "gradients into float32": r"distributed/|optimizer_step\.py:(hook|_clear_stale)",
    "optimizer": r"optimizer|one_pass|triton/adam",
}
"""Parts of a step by who asks for an operation; the first that fits."""


def part_of(caller: str) -> str:
    """Which of ``PARTS``."""
    return next((part for part, pattern in PARTS.items() if re.search(pattern, caller)), "other")


def seconds(op: Any) -> float:
    """On the device."""
    is_grouped = op.name in ("_grouped_mm", "grouped_weight_grad_kernel")
    rate = GROUPED if is_grouped else CHUNKS if op.is_triton else PRODUCTS
    rate = ATTENTION if "attention" in op.name else rate
    if not op.is_triton and op.shapes.startswith("float32") and op.name in ("mm", "bmm"):
        rate = SINGLE
    return max(op.moved / BANDWIDTH, op.flops / rate) + LAUNCH * op.launches


def trace(model: str, asked: argparse.Namespace) -> Any:
    """The second step of a run; the first makes the optimizer's states."""
    from predict import pretend
    from predict.trace import recording

    os.environ |= {"LINEAR_MOE_KERNELS": "triton", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.environ.pop("TRITON_INTERPRET", None)
    argv = arguments(model, asked)
    pretend.one_h100()
    pretend.one_rank()
    from megatron.core.enums import ModelType
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.utils import get_model_config
    from megatron.training import training
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.initialize import initialize_megatron

    from linear_moe.model.builder import padded_vocab_size
    from linear_moe.training import arguments as ours
    from linear_moe.training import engine, pretrain
    from linear_moe.training.flops import flops_per_token

    args = pretrain.prepare_arguments(argv)
    config = ours.model_config(args)
    engine.install()
    with recording() as recorder:
        initialize_megatron()
        groups = ProcessGroupCollection.use_mpu_process_groups()
        container = pretrain_cfg_container_from_args(args, config)
        stages, optimizer, scheduler = training.setup_model_and_optimizer(
            ModelType.encoder_or_decoder, cfg_container=container, pg_collection=groups
        )
        model_config = get_model_config(stages[0])
        model_config.grad_scale_func = optimizer.scale_loss  # as train() does
        model_config.finalize_model_grads_func = training.finalize_model_grads
        stages[0].train()
        for step in range(2):
            recorder.trace.begin()
            training.train_step(
                pretrain.forward_step, batches(args), stages, optimizer, scheduler, model_config,
                get_forward_backward_func(), step,
            )  # fmt: skip
    count = flops_per_token(config.transformer, padded_vocab_size(config))
    recorder.trace.flops = count.of_step(args.global_batch_size * args.seq_length, args.seq_length)
    return recorder.trace


def arguments(model: str, asked: argparse.Namespace) -> list[str]:
    """Of the trainer, as ``bench step`` has the launcher make them."""
    from linear_moe.bench import step
    from linear_moe.bench.configurations import Sweep, plan_of, sweep
    from linear_moe.launch.megatron_args import training_arguments

    words = ["--models", model, "--size", asked.size, "--seq-lens", str(asked.seq_len)]
    words += ["--tokens", str(asked.tokens), "--micro-tokens", str(asked.micro_tokens)]
    (configuration,) = sweep(
        Sweep.of(step.parser().parse_args(words + ["--set", *asked.set] * bool(asked.set)))
    )
    folder = tempfile.gettempdir()
    data = dict(DATASET_PATH="mock", TOKENIZER="null", OUTPUT_BASEPATH=folder, RUN_NAME="none")
    argv = training_arguments(plan_of(configuration, 1, **data))
    load = argv.index("--load")
    return [*argv[:load], *argv[load + 2 :], "--disable-gloo-process-groups"]


def batches(args: Any) -> Any:
    """Of the data loader."""
    import torch

    shape = args.micro_batch_size, args.seq_length
    names = ("tokens", "labels", "position_ids")
    while True:
        batch = {name: torch.zeros(shape, dtype=torch.int64) for name in names}
        yield batch | {"loss_mask": torch.ones(shape)}


def predict(job: tuple[str, argparse.Namespace]) -> dict[str, Any]:
    """What one model takes, in seconds, bytes and numbers."""
    model, asked = job
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        warnings.simplefilter("ignore")
        try:
            found = trace(model, asked)
        except ValueError as error:  # the launcher's cannot be pickled, and the pool would wait for ever
            raise ValueError(str(error)) from error
    parts: dict[str, float] = defaultdict(float)
    phases: dict[str, float] = defaultdict(float)
    ops: dict[str, list[float]] = defaultdict(lambda: [0.0, 0, 0.0])
    for op in found.ops:
        parts[part_of(op.caller)] += seconds(op)
        phases[op.phase] += seconds(op)
        row = ops[f"{op.phase} {op.caller} {op.name}"]
        row[:] = row[0] + seconds(op), row[1] + op.launches, row[2] + op.moved / 1e9
    total = sum(parts.values())
    launches = sum(op.launches for op in found.ops)
    host = ON_HOST["operation"] * found.dispatched + ON_HOST["launch"] * launches
    return {
        "model": model,
        "parts": dict(parts),
        "phases": dict(phases),
        "seconds": total,
        "mfu": found.flops / total / DATASHEET,
        "tokens_per_second": asked.tokens / total,
        "launches": launches,
        "host_seconds": host + ON_HOST["triton"] * sum(op.is_triton for op in found.ops),
        "peak_gib": found.peak / 2**30,
        "ops": sorted(([name, *row] for name, row in ops.items()), key=lambda row: -row[1])[: asked.ops],
    }


def table(found: list[dict[str, Any]]) -> str:
    """Milliseconds by part, and the totals."""
    rows = [["ms", *(one["model"] for one in found)], ["---", *("--:" for _ in found)]]
    for part in [*PARTS, "other"]:
        rows.append([part, *(f"{1e3 * one['parts'].get(part, 0.0):.1f}" for one in found)])
    for phase in ("forward", "recomputed", "backward"):
        rows.append([f"*{phase}*", *(f"{1e3 * one['phases'].get(phase, 0.0):.0f}" for one in found)])
    rows.append(["**step**", *(f"**{1e3 * one['seconds']:.0f}**" for one in found)])
    rows.append(["MFU", *(f"{one['mfu']:.1%}" for one in found)])
    rows.append(["tokens/s", *(f"{one['tokens_per_second']:,.0f}" for one in found)])
    rows.append(["host, ms", *(f"{1e3 * one['host_seconds']:.0f}" for one in found)])
    rows.append(["launches", *(f"{one['launches']:,}" for one in found)])
    rows.append(["peak GiB", *(f"{one['peak_gib']:.1f}" for one in found)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Every model in a process of its own: Megatron has one model a process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("models", nargs="*", default=MODELS, help="LA_MODULE[:LAYER_TYPE_LIST] each")
    add("--size", default="A0.3B", help="MODEL_SIZE")
    add("--seq-len", type=int, default=2048)
    add("--tokens", type=int, default=65536, help="of a step")
    add("--micro-tokens", type=int, default=32768, help="of a micro batch: 65536 needs more than 80 GB")
    add("--set", nargs="+", default=[], metavar="VARIABLE=VALUE", help="variables of the run script")
    add("--ops", type=int, default=0, help="also the operations that take most")
    add("--json", type=Path, help="write all of it")
    asked = parser.parse_args()
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        found = pool.map(predict, [(model, asked) for model in asked.models], chunksize=1)
    print(table(found))
    for one in found if asked.ops else ():
        print(f"\n{one['model']}")
        for name, time, launches, moved in one["ops"]:
            print(f"{1e3 * time:8.2f} ms {launches:6d} launches {moved:7.1f} GB  {name}")
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
