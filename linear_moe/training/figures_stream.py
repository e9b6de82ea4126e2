"""A step's figures are computed and read on a CUDA stream of their own, while the optimizer's kernels run.

Losses, loads of experts and what else a step reports are there before the optimizer's kernels are launched. Megatron
reads them behind these, and its timer waits for the whole device. Then the host, which needs about as long to launch a
layer's forward pass as the GPU to run it, begins the next step on an idle GPU. A stream of its own does not wait: the
host is ahead by the time that the optimizer takes, 30 ms of an H100 with 2.5 billion parameters.

Where the host waits for other reasons nothing is gained: data parallelism with the distributed optimizer reduces losses
by the communicator that gathers parameters, pipelines and Megatron's dispatchers of experts wait for the device.

It is in use between the optimizer's step and the end of Megatron's ``training_log``. What reads weights meanwhile, a
checkpoint or their norm, ends that first. With CUDA_DEVICE_MAX_CONNECTIONS=1, which tensor and context parallelism
want, a GPU takes kernels of all streams in the order of their launches, and all is as in Megatron.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from typing import Any

import torch

from linear_moe.training import cpu

READ_WEIGHTS = ("save_checkpoint_and_time", "calc_params_l2_norm")
"""Functions of ``megatron.training.training`` that may run between the optimizer's step and the log."""

WRITE_WEIGHTS = ("qk_clip", "log_max_attention_logit", "save_params_interval")
"""Arguments of Megatron with which a step reads or writes weights behind the optimizer: all is as in Megatron."""


class FiguresStream:
    """The stream of figures of this process, and the one that waits for it while it is in use."""

    def __init__(self) -> None:
        self._own: torch.cuda.Stream | None = None
        self._waiting: torch.cuda.Stream | None = None

    def open(self, ready: torch.cuda.Event) -> None:
        """Use it for all that is launched from now on; it waits for ``ready`` alone."""
        if self._own is None:
            self._own = torch.cuda.Stream(priority=-1)  # before the blocks of optimizer's kernels that wait
        self._own.wait_event(ready)
        self._waiting = torch.cuda.current_stream()
        torch.cuda.set_stream(self._own)

    def close(self) -> None:
        """Go back, if it is in use; what is launched then comes after both."""
        if self._waiting is None:
            return
        waiting, self._waiting = self._waiting, None
        waiting.wait_stream(torch.cuda.current_stream())
        torch.cuda.set_stream(waiting)


_figures = FiguresStream()


def _is_useful() -> bool:
    from megatron.training import get_args

    has_one_queue = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1"
    if cpu.is_active() or not torch.cuda.is_available() or has_one_queue:
        return False
    return not any(getattr(get_args(), name, None) for name in WRITE_WEIGHTS)


def open_after_optimizer(original: Callable) -> Callable:
    """``train_step`` leaves it in use behind the optimizer's step, waiting for what came before that."""

    @functools.wraps(original)
    def train_step(step: Any, data: Any, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_useful():
            return original(step, data, model, optimizer, *args, **kwargs)
        _figures.close()  # if something came between the last step and its log
        stock, is_own = optimizer.step, "step" in vars(optimizer)

        def stepped() -> Any:
            ready = torch.cuda.current_stream().record_event()
            is_updated, norm, _ = found = stock()
            # A norm that was not waited for is not ready, as is a loss scale behind a step that was skipped.
            if is_updated and not isinstance(norm, torch.Tensor):
                _figures.open(ready)
            return found

        optimizer.step = stepped
        try:
            return original(step, data, model, optimizer, *args, **kwargs)
        except BaseException:
            _figures.close()
            raise
        finally:
            if is_own:
                optimizer.step = stock
            else:
                del optimizer.step

    return train_step


def close_after(original: Callable) -> Callable:
    """``training_log`` is the last that it is used for."""

    @functools.wraps(original)
    def training_log(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        finally:
            _figures.close()

    return training_log


def close_before(original: Callable) -> Callable:
    """For a function that reads weights."""

    @functools.wraps(original)
    def on_the_waiting_stream(*args: Any, **kwargs: Any) -> Any:
        _figures.close()
        return original(*args, **kwargs)

    return on_the_waiting_stream


def lap(timer: Any) -> float:
    """Seconds since the last lap by a running timer of Megatron, whose ``elapsed`` waits for the device.

    The host waits for the gradients' norm in every step, so that laps are as long as steps.
    """
    before, timer._start_time = timer._start_time, time.time()
    running = timer._start_time - before
    seconds, timer._elapsed = timer._elapsed + running, 0.0
    timer._active_time += running
    return seconds
