"""A training run that is watched: ``pretrain`` with the same arguments, plus when it started and what its kernels cost.

``python -m linear_moe.bench.watched <arguments of linear_moe.training.pretrain>`` is what a measurement starts in the
place of ``linear_moe.training.pretrain``. The variable LINEAR_MOE_WATCH says where to write, and what to profile.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from linear_moe.training import pretrain  # first: it looks for a device

# isort: split
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from linear_moe.bench.breakdown import breakdown, device_spans, device_times, pauses
from linear_moe.bench.configurations import PROFILED_STEPS, TRACE, WATCH, Watch
from linear_moe.bench.record import versions, write_text
from linear_moe.training import cpu
from linear_moe.training.metrics import RunLog, peak_flops

CUDA = [] if cpu.is_active() else [ProfilerActivity.CUDA]


class WatchedLog(RunLog):
    """The log of a run, which also sees each step end."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.watch = Watch(**json.loads(os.environ[WATCH]))
        self._profiler: profile | None = None

    def _measure(self, iteration: int, *args: Any, **kwargs: Any) -> dict[str, Any]:
        step = super()._measure(iteration, *args, **kwargs)
        if dist.get_rank() == 0:
            if iteration == 1:
                self._write_file("start.json", {"end_of_first_step": time.time(), **_machine()})
            if iteration == self.watch.profile_after:
                self._profiler = self._started(activities=CUDA or [ProfilerActivity.CPU])
            elif iteration == self.watch.trace_after:
                profiler = self._stopped()
                found = breakdown(device_times(profiler, on_cpu=not CUDA), PROFILED_STEPS)
                if CUDA:
                    found["pauses"] = pauses(device_spans(profiler), PROFILED_STEPS)
                self._write_file("profile.json", found)
                self._profiler = self._started(activities=[ProfilerActivity.CPU, *CUDA], record_shapes=True)
            elif iteration == self.watch.trace_until:
                self._stopped().export_chrome_trace(str(Path(self.watch.folder, TRACE)))
        return step

    def _started(self, **options: Any) -> profile:
        torch.cuda.synchronize()  # the step before this one is still at its optimizer
        profiler = profile(**options)
        profiler.start()
        return profiler

    def _stopped(self) -> profile:
        assert self._profiler is not None
        torch.cuda.synchronize()
        self._profiler.stop()
        return self._profiler

    def _write_file(self, name: str, content: dict[str, Any]) -> None:
        write_text(Path(self.watch.folder, name), json.dumps(content, indent=1) + "\n")


def _machine() -> dict[str, Any]:
    return {
        "device": "CPU" if cpu.is_active() else torch.cuda.get_device_name(),
        "peak_tflops": (peak_flops() or 0) / 1e12 or None,
        "versions": versions("torch", "megatron-core", "triton", "nvidia-cuda-nvcc"),
    }


if __name__ == "__main__":
    pretrain.main(sys.argv[1:], WatchedLog)
