"""What a run says of itself: its line, and a file that survives a run that was killed while it wrote."""

import json

import pytest
import torch

from linear_moe.training import cpu
from linear_moe.training.metrics import open_metrics, peak_flops, progress_line


def test_a_line_cut_short_is_left_out_when_the_run_goes_on(tmp_path):
    steps = [{"iteration": i, "seconds": 1.0} for i in range(1, 5)]
    whole = "".join(json.dumps(step) + "\n" for step in steps[:3])
    (tmp_path / "metrics.jsonl").write_text(whole + json.dumps(steps[3])[:10])
    with open_metrics(tmp_path, steps[2]) as file:
        file.write(json.dumps(steps[2]) + "\n")
    kept = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in kept] == steps[:3]


def test_days_are_hours():
    step = {"iteration": 10, "seconds": 3.0, "grad_norm": None, "learning_rate": 1e-4, "peak_memory_gib": 1.0}
    step |= {"tokens_per_second_per_gpu": 1e3, "tflops_per_gpu": 1.0, "mfu": None}
    assert progress_line(step, 70_017, 1).endswith("  eta 58h20m21s")
    assert progress_line(step, 10, 1).endswith("  eta 00h00m00s")


def test_the_progress_line():
    step = {"iteration": 250, "seconds": 1.5, "grad_norm": 1.234, "learning_rate": 3e-4, "lm_loss": 2.34567}
    step |= {"tokens_per_second_per_gpu": 12_345.0, "tflops_per_gpu": 412.3, "mfu": 0.417}
    step |= {"peak_memory_gib": 61.25, "moe_load_max_over_mean": 1.426}
    step |= {"memory_load": [[0.25, 0.75], [0.25, 0.25, 0.5]]}
    assert progress_line(step, 1000, 8) == (
        "step    250/1000   25.0%  loss 2.3457  gnorm 1.23  lr 3.0e-04  98.8k tok/s  412 TF 41.7% MFU  61.2G  "
        "imb 1.43  mem 1.50  eta 00h18m45s"
    )
    bare = {name: step[name] for name in step if not name.startswith(("lm", "moe", "memory"))}
    assert progress_line(bare | {"grad_norm": None, "mfu": None, "skipped": True}, 1000, 1) == (
        "step    250/1000   25.0%  loss -  gnorm -  lr 3.0e-04  12.3k tok/s  412 TF  61.2G  SKIPPED"
    )


def test_an_evaluation_comes_behind_its_step(tmp_path):
    """A run that goes on from step 2 keeps the evaluation of step 2; one that evaluates anew keeps its step."""
    steps = [{"iteration": i, "seconds": 1.0} for i in (1, 2, 3)]
    evaluation = {"iteration": 2, "validation_loss": 2.0}
    text = "".join(json.dumps(record) + "\n" for record in (*steps[:2], evaluation, steps[2]))
    for first, kept in ((steps[2], [*steps[:2], evaluation]), (evaluation, steps[:2]), (steps[1], steps[:1])):
        (tmp_path / "metrics.jsonl").write_text(text)
        open_metrics(tmp_path, first).close()
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == kept
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_the_peak_of_a_device(monkeypatch, name, peak):
    """Dense bf16 TFLOP/s of NVIDIA's datasheets (half of those with sparsity), by the name that the driver gives."""
    monkeypatch.setattr(cpu, "is_active", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    found = peak_flops.__wrapped__()
    assert found == (None if peak is None else peak * 1e12)
    for active, available in ((True, True), (False, False)):
        monkeypatch.setattr(cpu, "is_active", lambda active=active: active)
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert peak_flops.__wrapped__() is None
