"""benchmarks/predict_step.py runs Megatron's train step on tensors without memory: what it counts is right."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from linear_moe.model.families import FAMILIES

ROOT = Path(__file__).parents[2]
TOKENS, MICRO_TOKENS = 256, 128
USED = {
    *("experts: grouped GEMM", "experts: SwiGLU", "experts: permutation", "router", "rotary positions"),
    *("softmax attention", "projections", "scan", "norm and gate of outputs", "gates and splits of mixers", "norms"),
    *("residual stream", "output loss", "gradients into float32", "optimizer"),
}  # fmt: skip


def predict(*words: str) -> subprocess.CompletedProcess[str]:
    """One layer of GLA and one of softmax attention, in two micro-batches."""
    sizes = [
        "--size",
        "tiny",
        "--seq-len",
        "64",
        "--tokens",
        str(TOKENS),
        "--micro-tokens",
        str(MICRO_TOKENS),
    ]
    command = [sys.executable, str(ROOT / "benchmarks" / "predict_step.py"), "gla:LN", *sizes, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All of it, with gradients of experts as those of other weights."""
    file = tmp_path_factory.mktemp("predicted") / "found.json"
    run = predict(
        "--set",
        "AC=none",
        "EXTRA_ARGS=--num-layers 2 --no-expert-gradients-in-place",
        "--ops",
        "9999",
        "--json",
        str(file),
    )
    assert run.returncode == 0, run.stderr[-3000:]
    (one,) = json.loads(file.read_text())
    assert f"| **step** | **{1e3 * one['seconds']:.0f}** |" in run.stdout
    return one


def moved(found: dict[str, Any], operation: str) -> float:
    """Bytes, of both directions."""
    return sum(1e9 * row[3] for row in found["ops"] if row[0].endswith(operation))


def test_all_of_a_step_has_a_part_and_a_phase(found: dict[str, Any]) -> None:
    parts = found["parts"]
    assert {part for part, seconds in parts.items() if seconds > 0} == {*USED, "other"}
    assert parts["other"] < 0.08 * found["seconds"], "PARTS does not know who asks for these"
    for sums in (parts, found["phases"]):
        assert sum(sums.values()) == pytest.approx(found["seconds"])
    assert found["tokens_per_second"] == pytest.approx(TOKENS / found["seconds"])
    assert sum(row[2] for row in found["ops"]) == found["launches"]


def test_bytes_of_gradients_and_of_the_output_loss(found: dict[str, Any]) -> None:
    """Counted by hand: bfloat16 gradients into a float32 sum, written by the first micro-batch and added to."""
    size = FAMILIES["qwen2"].sizes["tiny"]
    hidden, vocabulary = size.hidden_size, size.vocab_size
    parameters = moved(found, "optimizer_step.py:norm linalg_vector_norm") / 4
    assert 2 * vocabulary * hidden < parameters < 1e6
    assert moved(found, "optimizer_step.py:hook copy_") == pytest.approx((2 + 4) * parameters, rel=0.01)
    added = moved(found, "distributed_data_parallel.py:hook add_")
    assert added == pytest.approx((2 + 4 + 4) * parameters, rel=0.01)
    assert moved(found, "reset zero_") == 0, "sums of gradients are not cleared"
    product = 2 * (MICRO_TOKENS * hidden + vocabulary * hidden + MICRO_TOKENS * vocabulary)
    logits_and_their_gradient = 2 * TOKENS // MICRO_TOKENS
    assert moved(found, "output_loss.py:forward mm") == logits_and_their_gradient * product


def test_a_mistake_is_told() -> None:
    run = predict("--set", "NOTHING=1")
    assert run.returncode == 1 and "NOTHING" in run.stderr.splitlines()[-3], run.stderr[-3000:]
