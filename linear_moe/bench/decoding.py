"""Steps of decoding, timed at ever later positions, each after the other on one model with random weights.

The time of a step does not depend on what was written, so a position is jumped to by setting how many tokens the cache
holds. Steps are the product's own (``linear_moe.inference.loop``): greedy, on a GPU one CUDA graph each.
"""

from __future__ import annotations

from linear_moe.training import cpu

if cpu.needed():
    cpu.activate()  # before Megatron looks for a device

import argparse
import gc
import statistics
import time
from collections.abc import Iterator

import torch

from linear_moe.bench.record import Row
from linear_moe.inference.decoder import Decoder
from linear_moe.inference.generate import LOOK_EVERY
from linear_moe.inference.load import LoadedModel, for_inference, join_single_process
from linear_moe.inference.loop import Loop
from linear_moe.inference.rebuild import single_process_arguments
from linear_moe.inference.sampling import Sampling
from linear_moe.launch.megatron_args import training_arguments
from linear_moe.launch.plan import RunPlan
from linear_moe.model.builder import LinearMoEBuilder
from linear_moe.training import arguments

WARM = 3
"""Steps before the measured ones: one as it is, one captured, one replayed."""


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


def device_name() -> str:
    """What is measured."""
    return "CPU" if cpu.is_active() else torch.cuda.get_device_name()


def free() -> None:
    """The memory of models that are done with."""
    gc.collect()
    torch.cuda.empty_cache()
