"""One configuration, measured in a process of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

from linear_moe.bench.configurations import Configuration, plan_of
from linear_moe.inference.quiet import no_messages
from linear_moe.launch.cluster import cuda_device_count
from linear_moe.launch.header import default_variables
from linear_moe.launch.megatron_args import torchrun_command
from linear_moe.launch.plan import RunPlan
from linear_moe.launch.relay import ended_by_signal

WATCHED = "linear_moe.bench.watched"
GRACE = 40
"""Seconds that torchrun gets to end its processes."""
FIGURES = ("tokens_per_second_per_gpu", "tflops_per_gpu", "mfu", "seconds")
_ERROR = re.compile(r"^(?:\[rank\d+\]: ?)?((?:\w+\.)*\w*(?:Error|Exception|Interrupt): .*)", re.MULTILINE)


def measure(configuration: Configuration, folder: Path, seconds: float) -> dict[str, Any]:
    """Run it within ``seconds`` and return its row of the results; a run that fails has a status and an error."""
    data = write_random_tokens(configuration, folder)
    plan = plan_of(configuration, cuda_device_count(), **data_and_output(data, folder))
    began = time.time()
    code = _run(command_of(plan), folder, _environment(plan, configuration, folder), seconds)
    return row(configuration, plan, folder, began, code)


def data_and_output(data: Path, folder: Path) -> dict[str, str]:
    """Variables of a configuration that say where it reads and writes."""
    return {
        "DATASET_PATH": str(data),
        "TOKENIZER": "null",
        "OUTPUT_BASEPATH": str(folder),
        "RUN_NAME": "run",
    }


def command_of(plan: RunPlan) -> list[str]:
    """What the launcher would start, with the watched entry in the place of ``pretrain``."""
    return [WATCHED if word == "linear_moe.training.pretrain" else word for word in torchrun_command(plan)]


def write_random_tokens(configuration: Configuration, folder: Path) -> Path:
    """Token files of uniformly random tokens, enough that no sequence comes twice; returns their prefix."""
    with no_messages():
        import numpy as np
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    plan = plan_of(configuration, cuda_device_count(), OUTPUT_BASEPATH=str(folder))
    settings, documents = plan.settings, 200  # 1 % of them is held out
    length = settings.tokens_per_step * settings.iterations // documents * 102 // 100 + settings.seq_len
    draw, prefix = np.random.default_rng(1), folder / "random"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(plan.vocab_size))
    for _ in range(documents):
        builder.add_document(draw.integers(0, plan.vocab_size, length, dtype=np.int32), [length])
    builder.finalize(f"{prefix}.idx")
    return prefix


def _environment(plan: RunPlan, configuration: Configuration, folder: Path) -> dict[str, str]:
    return {
        **default_variables(plan),
        **os.environ,
        **configuration.watch(folder).environment(),
        "PYTHONUNBUFFERED": "1",
    }


def _run(command: list[str], folder: Path, environment: dict[str, str], seconds: float) -> int | None:
    """Exit code; ``None`` when the time was over."""
    with (folder / "log").open("wb") as log:
        run = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return run.wait(None if seconds == float("inf") else seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end(run)


def _end(run: subprocess.Popen) -> None:
    """Torchrun ends its processes, which have sessions of their own, when it is told to stop."""
    if run.poll() is None:
        run.send_signal(signal.SIGTERM)
        try:
            run.wait(GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()


def row(
    configuration: Configuration, plan: RunPlan, folder: Path, began: float, code: int | None
) -> dict[str, Any]:
    """Figures of a run from what it left in its folder."""
    metrics = plan.run_dir / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    steps = [json.loads(line) for line in lines if line.endswith("}")]
    counted = steps[configuration.warm_up : configuration.warm_up + configuration.steps]
    found: dict[str, Any] = {"status": "ok", "micro_batch": plan.settings.batch_size, "steps": len(counted)}
    if code != 0:
        reason = (
            "the time was over" if code is None else failure((folder / "log").read_text(errors="replace"))
        )
        # a run that was stopped has figures, too, where its steps give a median
        found |= {"status": "stopped" if code is None and len(counted) > 2 else "failed", "error": reason}
    if found["status"] != "failed":
        found |= {name: _median([step[name] for step in counted]) for name in FIGURES}
        found["peak_memory_gib"] = max(step["peak_memory_gib"] for step in steps)
        found["allocator_retries"] = sum(step["allocator_retries"] for step in counted)
        found["losses"] = [steps[0].get("lm_loss"), counted[-1].get("lm_loss")]
    if (start := _read(folder / "start.json")) is not None:
        found["first_step_seconds"] = start.pop("end_of_first_step") - began
        found |= start
    if (profile := _read(folder / "profile.json")) is not None:
        found["profile"] = profile
    return found


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() else None


def failure(log: str) -> str:
    """The error that ended a run, from its log: the first that is not torchrun's own."""
    errors = [error for error in _ERROR.findall(log) if "ChildFailedError" not in error]
    lines = log.strip().splitlines()
    last = lines[-1] if lines else "it wrote nothing"
    return (errors[0] if errors else ended_by_signal(log) or last)[:300]
