"""What stands in for ``torch.cuda`` on the CPU platform: small objects and wrappers, installed by ``cpu.activate``.

Everything here is inert until it is assigned. Megatron-Core asks for "the CUDA device" in four ways - a ``device=``
argument, ``.cuda()``, a stream, the RNG - and each has one answer below: the CPU, the same tensor, nothing, the default
generator.
"""

import collections
import functools
import logging
import os
import platform
import resource
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# `--moe-grouped-gemm` accepts no less than 8; below 10 Megatron demands CUDA_DEVICE_MAX_CONNECTIONS=1 for TP and CP.
COMPUTE_CAPABILITY = (10, 0)


def on_cpu(device: Any) -> Any:
    """`device`, unless it names a CUDA device (a string, a ``torch.device`` or a plain index): then the CPU."""
    if isinstance(device, bool):
        return device
    if isinstance(device, int) or (isinstance(device, str) and device.startswith("cuda")):
        return torch.device("cpu")
    if isinstance(device, torch.device) and device.type == "cuda":
        return torch.device("cpu")
    return device


def factory(make: Callable) -> Callable:
    """`make` (``torch.empty`` and its kin, ``Tensor.new_empty`` and its kin) with ``device=`` sent to the CPU."""

    @functools.wraps(make)
    def call(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") is not None:
            kwargs["device"] = on_cpu(kwargs["device"])
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return make(*args, **kwargs)

    return call


def tensor_to(to: Callable) -> Callable:
    """``Tensor.to`` with its device, positional or named, sent to the CPU."""

    @functools.wraps(to)
    def call(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args:
            args = (on_cpu(args[0]), *args[1:])
        if kwargs.get("device") is not None:
            kwargs["device"] = on_cpu(kwargs["device"])
        return to(self, *args, **kwargs)

    return call


def tensor_type(original: Callable) -> Callable:
    """``Tensor.type`` that calls a CPU tensor 'torch.cuda.FloatTensor', which is how the optimizers sort parameters."""

    @functools.wraps(original)
    def call(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        if not args and not kwargs and answer.startswith("torch.") and answer.count(".") == 1:
            return answer.replace("torch.", "torch.cuda.")
        return answer

    return call


def device_context(init: Callable) -> Callable:
    """``with torch.device(...)``: its ``__init__``, sent to the CPU."""

    @functools.wraps(init)
    def call(self: Any, device: Any) -> None:
        init(self, on_cpu(torch.device(device)))

    return call


def itself(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The tensor, unchanged and not copied (``Tensor.cuda``, ``Tensor.pin_memory``)."""
    return tensor


def nothing(*args: Any, **kwargs: Any) -> None:
    """Do nothing (synchronize, set_device, ...)."""


def zero(*args: Any, **kwargs: Any) -> int:
    """0: a memory figure that the CPU has no counterpart of."""
    return 0


def no(*args: Any, **kwargs: Any) -> bool:
    """False: such as "is a graph being captured"."""
    return False


def yes(*args: Any, **kwargs: Any) -> bool:
    """True: such as "is there a CUDA device"."""
    return True


def local_rank() -> int:
    """This process's index on its machine: what ``torch.cuda.current_device`` would be under torchrun."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Processes on this machine: what ``torch.cuda.device_count`` would be under torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def peak_memory(*args: Any, **kwargs: Any) -> int:
    """Peak resident memory of this process in bytes: the CPU's counterpart of ``max_memory_allocated``."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB


def memory_stats(*args: Any, **kwargs: Any) -> dict[str, int]:
    """Every statistic is 0, except the peaks."""
    stats: dict[str, int] = collections.defaultdict(int)
    stats["allocated_bytes.all.peak"] = peak_memory()
    return stats


def memory_info(*args: Any, **kwargs: Any) -> tuple[int, int]:
    """(free, total) bytes of main memory."""
    page = os.sysconf("SC_PAGE_SIZE")
    return os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page


def device_name(*args: Any, **kwargs: Any) -> str:
    """The processor's name."""
    return platform.processor() or platform.machine()


def device_capability(*args: Any, **kwargs: Any) -> tuple[int, int]:
    """A compute capability which asks for no work-around; no kernel is chosen by it on the CPU."""
    return COMPUTE_CAPABILITY


def device_properties(*args: Any, **kwargs: Any) -> SimpleNamespace:
    """The properties that Megatron reads."""
    major, minor = COMPUTE_CAPABILITY
    return SimpleNamespace(
        name=device_name(), major=major, minor=minor, total_memory=memory_info()[1], multi_processor_count=1
    )


class Stream:
    """A stream on which everything has already happened."""

    cuda_stream = 0

    def __init__(self, device: Any = None, priority: int = 0, **kwargs: Any) -> None:
        self.device = torch.device("cpu")
        self.priority = priority

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def record_event(self, event: "Event | None" = None) -> "Event":
        """Record `event`, or a new one, now."""
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        """Whether it is over: it is."""
        return True

    synchronize = wait_event = wait_stream = nothing


class Event:
    """An event that is over as soon as it is recorded; it does keep time."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seconds = 0.0

    def record(self, stream: Any = None) -> None:
        """Note the time."""
        self.seconds = time.perf_counter()

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds from this event to `end`."""
        return (end.seconds - self.seconds) * 1e3

    def query(self) -> bool:
        """Whether it is over: it is."""
        return True

    synchronize = wait = nothing


THE_STREAM = Stream()


def the_stream(*args: Any, **kwargs: Any) -> Stream:
    """The only stream."""
    return THE_STREAM


class NothingAround:
    """A context that changes nothing (``torch.cuda.stream``, and ``torch.cuda.device``, which has to be a class)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


def generators() -> dict[int, torch.Generator]:
    """``torch.cuda.default_generators``: the default generator, whatever the index."""
    return collections.defaultdict(lambda: torch.default_generator)


def run_now(call: Callable, **kwargs: Any) -> None:
    """``torch.cuda._lazy_call``, which otherwise waits for a CUDA initialisation that never comes."""
    call()


def uncompiled(model: Callable | None = None, **kwargs: Any) -> Callable:
    """``torch.compile`` that does not."""
    return model if model is not None else lambda function: function


def get_rng_state(device: Any = "cuda") -> Tensor:
    """State of the default generator, [5056] uint8: it draws for CPU tensors, so it plays the CUDA generator."""
    return torch.default_generator.get_state()


def set_rng_state(state: Tensor, device: Any = "cuda") -> None:
    """Set the default generator's state."""
    torch.default_generator.set_state(state)


def manual_seed(seed: int) -> None:
    """Seed the default generator."""
    torch.default_generator.manual_seed(int(seed))


def initial_seed() -> int:
    """The default generator's seed."""
    return torch.default_generator.initial_seed()


def data_iterator(init: Callable) -> Callable:
    """A data loader iterator's ``__init__`` that pins no memory, and leaves the default generator as it found it.

    It draws one number to seed its workers, only on ranks that read data and only at a (re)start. On a GPU that leaves
    the model's generator alone; here it would set tensor-parallel ranks, and a resumed run, apart.
    """

    @functools.wraps(init)
    def call(self: Any, loader: Any) -> None:
        state = torch.default_generator.get_state()
        loader.pin_memory = False
        init(self, loader)
        torch.default_generator.set_state(state)

    return call


def not_about_forks(record: logging.LogRecord) -> bool:
    """Drop "CPU RNG state changed within GPU RNG context": on this platform it has to."""
    return not record.getMessage().startswith("CPU RNG state changed within GPU RNG context")


def all_to_all_single(original: Callable) -> Callable:
    """Takes split sizes as tensors too: Megatron converts only CUDA tensors of them."""

    def as_list(sizes: Any) -> Any:
        return sizes.tolist() if isinstance(sizes, Tensor) else sizes

    @functools.wraps(original)
    def call(
        output: Tensor,
        input: Tensor,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        **kwargs: Any,
    ) -> Any:
        return original(output, input, as_list(output_split_sizes), as_list(input_split_sizes), **kwargs)

    return call


def all_gather(original: Callable) -> Callable:
    """Takes outputs of unequal shapes too (one broadcast per rank): gloo refuses them."""

    @functools.wraps(original)
    def call(tensor_list: list[Tensor], tensor: Tensor, group: Any = None, async_op: bool = False) -> Any:
        if all(out.shape == tensor_list[0].shape for out in tensor_list):
            return original(tensor_list, tensor, group, async_op)
        assert not async_op, "an uneven all_gather has no asynchronous form on the CPU platform"
        tensor_list[dist.get_rank(group)].copy_(tensor)
        for rank, out in enumerate(tensor_list):
            dist.broadcast(out, group=group, group_src=rank)
        return None

    return call
