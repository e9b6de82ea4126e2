"""``python -m linear_moe.bench step``: what it measures, what it says of it, and that one failure does not end it."""

import contextlib
import json
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from linear_moe.bench import __main__ as command_line
from linear_moe.bench import running, step
from linear_moe.bench.breakdown import KINDS, OTHER, OURS, _our_kernels, breakdown, kind_of
from linear_moe.bench.configurations import Configuration, Sweep, plan_of, sweep
from linear_moe.launch.errors import PreflightError
from linear_moe.launch.megatron_args import training_arguments
from tests.training.tiny import metrics

TINY = ["--size", "tiny", "--tokens", "128", "--steps", "3", "--warm-up", "1", "--set", "PR=fp32"]


def configurations(*argv: str) -> list[Configuration]:
    return sweep(Sweep.of(step.parser().parse_args([*TINY, *argv])))


def test_a_step_has_as_many_tokens_at_every_length():
    found = configurations("--models", "gla", "kda:LLLN", "softmax", "--seq-lens", "32", "128")
    assert [(c.model, c.seq_len) for c in found] == [
        *(("gla", 32), ("kda:LLLN", 32), ("softmax", 32)),
        *(("gla", 128), ("kda:LLLN", 128), ("softmax", 128)),
    ]
    for c in found:
        plan = plan_of(c, 1)
        s = plan.settings
        assert (s.tokens_per_step, plan.global_batch_size * c.seq_len, s.iterations) == (128, 128, 4)
        assert s.batch_size == plan.global_batch_size, "one micro batch: memory is of the same tokens, too"
    kinds = [plan_of(c, 1).kinds for c in found[:3]]
    assert kinds == [("gla",) * 4, ("kda", "kda", "kda", "softmax"), ("softmax",) * 4]
    halves = configurations("--models", "gla", "--seq-lens", "32", "128", "--micro-tokens", "64")
    assert [c.variables["BATCH_SIZE"] for c in halves] == ["2", "1"]


def test_changes_at_the_first_length():
    found = configurations("--models", "gla", "--seq-lens", "32", "64", "--vary", "USE_GEMM=false AC=none")
    assert [(c.label, c.seq_len) for c in found] == [
        ("gla", 32),
        ("gla USE_GEMM=false AC=none", 32),
        ("gla", 64),
    ]
    changed = plan_of(found[1], 1).settings
    assert (changed.use_gemm, changed.ac, changed.pr) == (False, "none", "fp32")


@pytest.mark.parametrize(
    "argv",
    [
        ["--seq-lens", "48"],
        ["--seq-lens", "32", "-5"],
        ["--seq-lens", "0"],
        ["--tokens", "-64"],
        ["--micro-tokens", "0"],
        ["--steps", "0"],
        ["--warm-up", "-1"],
        ["--models", "gal"],
        ["--models", "gla:LLLNN"],
        ["--vary", "USE_GEM=false"],
        ["--set", "AC"],
        ["--size", "A9"],
        ["--seq-lens", "32", "--micro-tokens", "96"],
    ],
    ids=" ".join,
)
def test_mistakes_start_nothing(argv: list[str], tmp_path: Path, capsys):
    base = ["step", *TINY, "--seq-lens", "64", "--models", "gla", "--output", str(tmp_path / "out")]
    with mock.patch.object(running, "_run", side_effect=AssertionError):
        assert command_line.main([*base, *argv]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and lines[1].startswith("  why: ") and lines[2].startswith("  try: "), lines
    if argv[-1] in ("-5", "0", "-64", "-1"):
        assert lines[0].startswith(f"linear_moe.bench: {argv[0]} {argv[-1]} is less than ")
        assert lines[2].startswith(f"  try: {argv[0]} ")
    assert not (tmp_path / "out").exists()
    assert command_line.main(["stp"]) == 2


def test_what_a_cpu_is_asked_for(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    """The defaults are of a GPU: 64k tokens of A0.3B are killed by memory. What is told instead passes."""
    monkeypatch.setattr(step, "cuda_device_count", lambda: 0)
    measured = Measured()
    assert step.main(["--output", str(tmp_path / "out")], measured) == 2
    what, why, instead = capsys.readouterr().err.splitlines()
    assert (
        what.startswith("linear_moe.bench: qwen2 A0.3B with 65536 tokens a step") and "in each of 30" in why
    )
    assert not measured.seen and not (tmp_path / "out").exists()
    words = instead.partition("linear_moe.bench step ")[2].split()
    step.main([*words, "--output", str(tmp_path / "out")], measured)
    assert measured.seen == [("gla", 256), ("softmax", 256), ("gla", 1024), ("softmax", 1024)]
    long = ["--size", "tiny", "--models", "softmax", "--output", str(tmp_path / "long")]
    assert step.main(long, measured) == 2, "softmax scores of 65536 x 65536"
    assert "SEQ_LEN=65536" in capsys.readouterr().err
    monkeypatch.setattr(step, "cuda_device_count", lambda: 1)
    step.main(["--models", "gla", "--seq-lens", "2048", "--output", str(tmp_path / "gpu")], measured)
    assert measured.seen[-1] == ("gla", 2048)


SPEED = {("gla", 32): 200.0, ("softmax", 32): 100.0, ("gla", 64): 190.0, ("softmax", 64): 50.0}


class Measured:
    """In the place of runs: figures by model and length, and an error where there is none."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def __call__(self, configuration: Configuration, folder: Path, seconds: float) -> dict[str, Any]:
        assert seconds > 0
        key = (configuration.label, configuration.seq_len)
        self.seen.append(key)
        if key not in SPEED:
            (folder / "log").write_text("a long story")
            return {"status": "failed", "error": "OutOfMemoryError: CUDA out of memory"}
        figures = {
            "tokens_per_second_per_gpu": SPEED[key],
            "tflops_per_gpu": 445.0,
            "mfu": 0.45,
            "seconds": 1.0,
        }
        about = {"device": "H100", "versions": {"torch": "2"}, "first_step_seconds": 41.0}
        return {"status": "ok", "steps": 20, "peak_memory_gib": 40.0 + len(self.seen), **figures, **about}


def test_a_failure_is_reported_and_the_rest_goes_on(tmp_path: Path, capsys):
    argv = [*TINY, "--models", "gla", "kda", "softmax", "--seq-lens", "32", "64", "--output", str(tmp_path)]
    measured = Measured()
    assert step.main(argv, measured) == 1
    assert measured.seen == [(m, n) for n in (32, 64) for m in ("gla", "kda", "softmax")]
    printed = capsys.readouterr().out
    assert "kda at 32 tokens: failed: OutOfMemoryError" in printed and "45.0 % MFU" in printed
    record = json.loads((tmp_path / "results.json").read_text())
    assert [row["status"] for row in record["results"]] == ["ok", "failed", "ok"] * 2
    assert "--models gla kda softmax" in record["command"]
    tables = (tmp_path / "results.md").read_text()
    for shown in (
        "| gla | 200 | 190 |",
        "| softmax | 100 | 50 |",
        "| gla | 445 (45.0 %) | 445 (45.0 %) |",
        "| gla | 2.00 | 3.80 |",
        "| gla | 32 - 64 | -5.0 % .. +0.0 % | +0.0 % .. +7.3 % |",
        "| gla | 41 | 41 |",
        "* kda at 64: failed: OutOfMemoryError: CUDA out of memory",
    ):
        assert shown in tables, shown
    assert (tmp_path / "failed_kda_64.log").read_text() == "a long story"
    assert (tmp_path / "results.png").stat().st_size > 1000

    again = Measured()
    assert step.main(argv, again) == 1
    assert again.seen == [("kda", 32), ("kda", 64)], "what is missing"
    everything = Measured()
    step.main([*argv, "--again", "--seq-lens", "32"], everything)
    assert len(everything.seen) == 3


def test_the_time_is_over(tmp_path: Path):
    argv = [*TINY, "--models", "gla", "--seq-lens", "32", "--output", str(tmp_path)]
    measured = Measured()
    assert step.main([*argv, "--minutes", "0.001"], measured) == 0
    assert not measured.seen and "not begun: the time was over" in (tmp_path / "results.md").read_text()
    step.main(argv, measured)
    assert measured.seen == [("gla", 32)]
    assert "not begun" not in (tmp_path / "results.md").read_text()


def test_a_run_that_does_not_end_is_ended(tmp_path: Path):
    began = time.time()
    assert running._run(["sleep", "30"], tmp_path, dict(os.environ), 0.2) is None
    assert time.time() - began < 10
    assert running._run(["false"], tmp_path, dict(os.environ), 5) == 1


@contextlib.contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    with mock.patch.dict(os.environ, variables):
        yield


def watched_run(rank: int, world: int, configuration: Configuration, folder: Path) -> dict[str, Any]:
    """What ``running.measure`` does, in this process instead of one that torchrun starts."""
    from linear_moe.bench.watched import WatchedLog
    from linear_moe.training import pretrain

    began = time.time()
    data = running.write_random_tokens(configuration, folder)
    plan = plan_of(configuration, 0, **running.data_and_output(data, folder))
    with environment(configuration.watch(folder).environment()):
        pretrain.main(training_arguments(plan), WatchedLog)
    return running.row(configuration, plan, folder, began, 0)


def test_figures_of_a_watched_run(gloo, tmp_path: Path):
    """Medians of the steps after warm-up; then the profile of further ones; and the tokens are random."""
    (configuration,) = configurations("--models", "gla:LLLN", "--seq-lens", "64", "--profile")
    (row,) = gloo(1, watched_run, configuration, tmp_path)
    steps = metrics(tmp_path / "run")
    assert len(steps) == 1 + 3 + 4 + 1 and (row["status"], row["steps"]) == ("ok", 3)
    for name in ("tokens_per_second_per_gpu", "tflops_per_gpu", "seconds"):
        assert row[name] == statistics.median(s[name] for s in steps[1:4])
    assert row["mfu"] is None and row["device"] == "CPU"
    assert row["tokens_per_second_per_gpu"] == pytest.approx(128 / row["seconds"])
    assert 0 < row["first_step_seconds"] < 60 and row["peak_memory_gib"] > 0
    assert row["losses"][0] == pytest.approx(np.log(1024), rel=0.02)
    assert row["profile"]["kinds"]["matrix products"]["seconds"] > 0
    assert sum(kind["seconds"] for kind in row["profile"]["kinds"].values()) < 5 * row["seconds"]
    assert all(kernel["launches"] > 0 for kernel in row["profile"]["kernels"])
    tokens = np.fromfile(tmp_path / "random.bin", np.uint16)
    assert len(tokens) > 9 * 128 and tokens.max() < 1024 and len(np.unique(tokens)) > 1000
    assert not (tmp_path / "run" / "checkpoint").exists()


def random_tokens(rank: int, world: int, configuration: Configuration, folder: Path) -> None:
    running.write_random_tokens(configuration, folder)


def test_no_sequence_comes_twice(gloo, tmp_path: Path):
    """Nor is much more written than a run reads: of a long one, 6 % or a sequence for each document."""
    (found,) = configurations("--models", "gla", "--seq-lens", "32", "--tokens", "8192", "--steps", "40")
    gloo(1, random_tokens, found, tmp_path)
    needed = 41 * 8192
    held = (tmp_path / "random.bin").stat().st_size // 2
    assert needed < 0.99 * held and held < 1.06 * needed + 32 * 200


def test_a_run_of_its_own(tmp_path: Path):
    """The command, with nothing in the place of anything."""
    argv = [*TINY, "--models", "mamba2:LN", "--seq-lens", "64", "--minutes", "2", "--output", str(tmp_path)]
    assert command_line.main(["step", *argv]) == 0
    (row,) = json.loads((tmp_path / "results.json").read_text())["results"]
    assert row["status"] == "ok" and row["steps"] == 3 and row["first_step_seconds"] > 1
    assert row["versions"]["torch"] and row["commit"] != "None"


def test_why_a_run_failed():
    log = (
        "W1121 something\n[rank0]: Traceback (most recent call last):\n[rank0]:   File x\n"
        "[rank0]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\n"
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n"
    )
    assert running.failure(log) == "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
    assert running.failure("Killed\n") == "Killed" and running.failure("") == "it wrote nothing"


def test_a_word_that_is_no_variable():
    with pytest.raises(PreflightError, match="sets no variable"):
        configurations("--set", "TOKENS=5")


@pytest.mark.parametrize(
    "name,kind",
    {
        "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)": "communication",
        "void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<128>>": "softmax attention",
        "void cutlass::device_kernel<at::cuda::detail::GroupProblemShape<cute::tuple<int, int, int>>>": (
            "grouped matrix products (experts)"
        ),
        "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT": "matrix products",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n": "matrix products",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<TensorListMetadata<4>>": "optimizer",
        "void at::native::(anonymous namespace)::cunn_SoftMaxForward<8, float>": "cross entropy, softmax",
        "void at::native::radixSortKVInPlace<-2, -1, 32, 32>": "sorting, gathering, scattering",
        "void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>": "copies and casts",
        "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(TensorIteratorBase&)>": (
            "copies and casts"
        ),
        "Memcpy DtoD (Device -> Device)": "copies and casts",
        "void at::native::reduce_kernel<512, 1, ReduceOp<float>>": "reductions",
        "void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add<float>>": "element-wise",
        "void at::native::unrolled_elementwise_kernel<at::native::CUDAFunctor_add<float>, LoadWithCast<2>>": (
            "element-wise"
        ),
        "void at::native::(anonymous namespace)::GammaBetaBackwardCUDAKernelTemplate<c10::BFloat16>": "norms",
        "aten::bmm": "matrix products",
        "diag_scan_kernel": OURS,
        "something_new": OTHER,
    }.items(),
)
def test_kinds_of_kernels(name: str, kind: str):
    assert kind_of(name) == kind


def test_time_by_kind():
    assert "diag_scan_kernel" in _our_kernels()
    found = breakdown([("nvjet_a", 2.0, 4), ("nvjet_b", 1.0, 2), ("Memset", 4.0, 8)], steps=2)
    assert list(found["kinds"].items()) == [
        ("copies and casts", {"seconds": 2.0, "launches": 4.0}),
        ("matrix products", {"seconds": 1.5, "launches": 3.0}),
    ]
    assert [kernel["name"] for kernel in found["kernels"]] == ["Memset", "nvjet_a", "nvjet_b"]
    assert set(found["kinds"]) < set(KINDS)
