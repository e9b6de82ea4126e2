"""What a run reports: one progress line per logged step, one JSON object per step or evaluation in ``metrics.jsonl``.

Megatron's ``training_log`` keeps TensorBoard, timers and the aux-loss tracker; its own line is replaced. Numbers of a
step come from all ranks: loss and gradient norm are global already, memory is the largest, expert load is summed.
Evaluations keep Megatron's line, and are an object of their own: ``iteration``, ``validation_loss`` and
``validation_perplexity``.
"""

from __future__ import annotations

import functools
import json
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.transformer.moe.router import Router
from megatron.training import get_args, get_timers
from torch import Tensor, nn

from linear_moe.training import cpu
from linear_moe.training.damage import not_a_number
from linear_moe.training.figures_stream import lap
from linear_moe.training.flops import FlopsPerToken
from linear_moe.training.memory_load import MemoryLoad

PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H800": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "B200": 2250e12,
    "GB200": 2500e12,
    "L40S": 362e12,
}
"""Dense bf16 peak by words of the device's name, from the vendors' datasheets; of several that fit, the first."""


@functools.cache
def peak_flops() -> float | None:
    """Dense bf16 peak of this device; ``None`` when it is not in the table (then there is no MFU to report)."""
    if cpu.is_active() or not torch.cuda.is_available():
        return None
    words = {*torch.cuda.get_device_name().replace("-", " ").split()}
    return next((peak for name, peak in PEAK_FLOPS.items() if words.issuperset(name.split())), None)


class ExpertLoad:
    """Counts, on the device, how many tokens every expert of every layer receives."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.tokens_LE = torch.zeros(num_layers, num_experts)

    def watch(self, model: nn.Module) -> None:
        """Count at every router of the model, on this rank's device."""
        self.tokens_LE = self.tokens_LE.to(torch.cuda.current_device())
        for module in model.modules():
            if isinstance(module, Router):
                module.register_forward_hook(self._count)

    def _count(self, router: Any, inputs: Any, outputs: tuple[Tensor, Tensor]) -> None:
        # With recomputation the first forward pass runs without gradients: count the other one.
        if router.training and torch.is_grad_enabled():
            tokens_E = getattr(router, "tokens_E", None)
            self.tokens_LE[router.layer_number - 1] += (
                outputs[1].detach().float().sum(0) if tokens_E is None else tokens_E
            )

    def take(self) -> dict[str, float]:
        """Balance over all ranks since the last call: a step's ``moe_load_*`` figures."""
        if dist.get_world_size() > 1:
            dist.all_reduce(self.tokens_LE)
        counts = self.tokens_LE.cpu()  # the GPU waits for the next step: one copy, and not a dozen launches
        counts = counts[counts.sum(1) > 0]
        mean_L = counts.mean(1)
        figures = {
            "moe_load_max_over_mean": (counts.amax(1) / mean_L).mean(),
            "moe_load_min_over_mean": (counts.amin(1) / mean_L).mean(),
            "moe_idle_experts": (counts == 0).sum(1).float().mean(),
        }
        values = torch.stack(list(figures.values())).tolist() if len(counts) else [0.0] * len(figures)
        self.tokens_LE.zero_()
        return dict(zip(figures, values))


FULL_STEPS = 3
"""Steps in which the allocator emptied its cache, before a person is told."""


class RunLog:
    """Replaces Megatron's ``training_log`` and listens to its evaluations: see the module's first line."""

    def __init__(
        self, run_dir: Path | None, flops: FlopsPerToken, loads: Sequence[ExpertLoad | MemoryLoad] = ()
    ) -> None:
        self.run_dir, self.flops, self.loads = run_dir, flops, loads
        self._file: TextIO | None = None
        self._evaluated = (-1, "validation")
        self._retries, self._full_steps = 0, 0

    def wrap(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Megatron's hook: the replacement, given the stock function."""

        def training_log(
            loss_dict: dict[str, Tensor],
            total_loss_dict: dict[str, Any],
            learning_rate: float | None,
            iteration: int,
            loss_scale: float,
            report_memory_flag: bool,
            skipped_iter: int,
            grad_norm: float | None,
            params_norm: float | None,
            num_zeros_in_grad: int | None,
            *args: Any,
            **kwargs: Any,
        ) -> bool:
            # Its interval never ends, so it prints nothing; the sums that it keeps are read and cleared here.
            kwargs["is_first_iteration"] = False
            original(
                loss_dict,
                total_loss_dict,
                learning_rate,
                iteration,
                loss_scale,
                False,
                skipped_iter,
                grad_norm,
                params_norm,
                num_zeros_in_grad,
                *args,
                **kwargs,
            )
            step = self._measure(iteration, learning_rate, grad_norm, **_packed(kwargs))
            step |= {name.replace(" ", "_"): _mean(value) for name, value in loss_dict.items()}
            step |= _moe_losses(total_loss_dict)
            if skipped_iter:
                step["skipped"] = True
            else:
                _check(step)
            total_loss_dict.clear()
            if dist.get_rank() == dist.get_world_size() - 1:
                self._write(step)
            return False

        return training_log

    def evaluation(self) -> dict[str, Callable[[Callable], Callable]]:
        """Megatron's functions to wrap: the first knows the step and the set; the other, which it calls, the loss."""
        return {"evaluate_and_print_results": self._note_evaluation, "evaluate": self._report_evaluation}

    def _note_evaluation(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def noted(
            prefix: str, forward: Any, data: Any, model: Any, iteration: int, *args: Any, **kwargs: Any
        ) -> Any:
            wanted = (iteration, "test" if prefix.endswith("test set") else "validation")
            if self._evaluated == wanted:
                return None  # at the end of a run, whose last step was one of those that are evaluated
            self._evaluated = wanted
            return original(prefix, forward, data, model, iteration, *args, **kwargs)

        return noted

    def _report_evaluation(self, original: Callable[..., Any]) -> Callable[..., Any]:
        # The mean over all tokens of all ranks, on the last stage; nothing when the time is over.
        @functools.wraps(original)
        def reported(*args: Any, **kwargs: Any) -> Any:
            results = original(*args, **kwargs)
            if dist.get_rank() == dist.get_world_size() - 1 and results[0]:
                iteration, name = self._evaluated
                loss = float(results[0]["lm loss"])
                perplexity = math.exp(min(20.0, loss))  # as Megatron prints it
                self._append({"iteration": iteration, f"{name}_loss": loss, f"{name}_perplexity": perplexity})
            return results

        return reported

    def _measure(
        self,
        iteration: int,
        learning_rate: float | None,
        grad_norm: float | None,
        tokens: float | None = None,
        squared_lengths: float | None = None,
    ) -> dict[str, Any]:
        """Everything that needs all ranks."""
        args = get_args()
        peak = peak_flops()
        seconds = lap(get_timers()("interval-time"))
        samples = args.micro_batch_size * mpu.get_data_parallel_world_size() * get_num_microbatches()
        tokens = samples * args.seq_length if tokens is None else tokens
        per_gpu = self.flops.of_step(tokens, args.seq_length, squared_lengths) / seconds / args.world_size
        allocator = torch.cuda.memory_stats()
        before, self._retries = self._retries, allocator["num_alloc_retries"]
        peak_gib = allocator["allocated_bytes.all.peak"] / 2**30
        largest = [peak_gib, learning_rate or 0.0, self._retries - before]
        if args.world_size > 1:
            of_all = torch.tensor(largest, dtype=torch.float64, device=torch.cuda.current_device())
            dist.all_reduce(of_all, dist.ReduceOp.MAX)
            largest = of_all.tolist()
        memory, lr, retries = largest
        step: dict[str, Any] = {
            "iteration": iteration,
            "grad_norm": None if grad_norm is None else float(grad_norm),
            "learning_rate": lr,
            "seconds": seconds,
            "tokens": tokens,
            "tokens_per_second_per_gpu": tokens / seconds / args.world_size,
            "tflops_per_gpu": per_gpu / 1e12,
            "mfu": per_gpu / peak if peak else None,
            "peak_memory_gib": memory,
            "allocator_retries": int(retries),
        }
        for load in self.loads:
            step |= load.take()
        return step

    def _write(self, step: dict[str, Any]) -> None:
        args = get_args()
        self._append(step)
        self._warn_of_full_memory(step)
        if step["iteration"] % args.progress_interval == 0 or step["iteration"] in (1, args.train_iters):
            sys.stdout.write(progress_line(step, args.train_iters, args.world_size) + "\n")
            sys.stdout.flush()

    def _warn_of_full_memory(self, step: dict[str, Any]) -> None:
        """Once, in the third step of this process in which it happened: a first one may find its way."""
        self._full_steps += step["allocator_retries"] > 0
        if step["allocator_retries"] and self._full_steps == FULL_STEPS:
            warnings.warn(
                f"step {step['iteration']}: GPU memory is so full that PyTorch empties its cache, and the GPU waits "
                f"(allocator_retries in metrics.jsonl: {step['allocator_retries']}, milliseconds each)\n"
                f"  try: a smaller BATCH_SIZE, AC=full, or PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True; with "
                f"experts EXTRA_ARGS=--recompute-expert-inputs",
                stacklevel=2,
            )

    def _append(self, record: dict[str, Any]) -> None:
        if self.run_dir is not None:
            if self._file is None:
                self._file = open_metrics(self.run_dir, record)
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()


def open_metrics(run_dir: Path, first: dict[str, Any]) -> TextIO:
    """``metrics.jsonl`` for appending ``first``, without what a resumed run does again."""
    path = run_dir / "metrics.jsonl"
    run_dir.mkdir(parents=True, exist_ok=True)
    if path.exists():
        lines = path.read_text().splitlines()
        kept = [line for line in lines if (record := _whole(line)) and _place(record) < _place(first)]
        part = path.with_suffix(".part")
        part.write_text("".join(line + "\n" for line in kept))
        part.replace(path)
    return path.open("a")


def _whole(line: str) -> dict[str, Any] | None:
    """A line's record; ``None`` for a part of one, which a killed run or a full disk leaves last."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _place(record: dict[str, Any]) -> tuple[int, bool]:
    """Where a record stands: an evaluation after its step."""
    return record["iteration"], "seconds" not in record


def progress_line(step: dict[str, Any], train_iters: int, world_size: int) -> str:
    """The one line a person reads: position, health, speed, memory, balance, time left."""
    done = step["iteration"]
    minutes, seconds = divmod(round((train_iters - done) * step["seconds"]), 60)
    mfu = "" if step["mfu"] is None else f" {100 * step['mfu']:4.1f}% MFU"
    parts = [
        f"step {done:6d}/{train_iters}",
        f"{100 * done / train_iters:5.1f}%",
        f"loss {step['lm_loss']:.4f}" if "lm_loss" in step else "loss -",
        "gnorm -" if step["grad_norm"] is None else f"gnorm {step['grad_norm']:.2f}",
        f"lr {step['learning_rate']:.1e}",
        f"{step['tokens_per_second_per_gpu'] * world_size / 1e3:.1f}k tok/s",
        f"{step['tflops_per_gpu']:.3g} TF{mfu}",
        f"{step['peak_memory_gib']:.1f}G",
    ]
    if "moe_load_max_over_mean" in step:
        parts.append(f"imb {step['moe_load_max_over_mean']:.2f}")
    if "memory_load" in step:
        uneven = [max(load) * len(load) for load in step["memory_load"]]
        parts.append(f"mem {sum(uneven) / len(uneven):.2f}")
    left = f"{minutes // 60:02d}h{minutes % 60:02d}m{seconds:02d}s"
    parts.append("SKIPPED" if step.get("skipped") else f"eta {left}")
    return "  ".join(parts)


def _mean(value: Tensor) -> float:
    return float(value.float().mean())


def _check(step: dict[str, Any]) -> None:
    """Stop a run before its spoiled weights are saved: on all ranks, if the gradient norm is known to them."""
    for name, what in (("grad_norm", "gradient norm"), ("lm_loss", "loss")):
        value = step.get(name)
        if value is not None and not math.isfinite(value):
            raise not_a_number(step["iteration"], what, value)


def _packed(kwargs: dict[str, Any]) -> dict[str, float | None]:
    return {
        "tokens": kwargs.get("total_real_tokens_in_batch"),
        "squared_lengths": kwargs.get("seqlen_squared_sum_in_batch"),
    }


def _moe_losses(total_loss_dict: dict[str, Any]) -> dict[str, float]:
    """What Megatron's tracker added for this step: ``load_balancing_loss`` and its kin, before their coefficient."""
    names = [name for name in total_loss_dict if name.endswith("loss") and " " not in name]
    return {f"moe_{name}": float(total_loss_dict[name]) for name in names}
