"""On a CUDA machine: nothing of the CPU platform is active, and the run script trains, packs and resumes in bf16."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples/linear_moe_qwen2/run_pretrain_qwen.sh"

pytestmark = pytest.mark.gpu


def test_nothing_of_the_cpu_platform_is_active():
    code = """
import torch
import linear_moe.training.pretrain
from linear_moe.training import cpu
assert not cpu.is_active() and not cpu.needed()
for patch in cpu.patches():
    module = getattr(getattr(patch.owner, patch.name), "__module__", None) or ""
    assert not module.startswith("linear_moe"), (patch.owner, patch.name)
assert torch.zeros(1, device="cuda").is_cuda
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=ROOT, timeout=120)


def train(folder: Path, name: str, **variables: str) -> list[dict]:
    environment = os.environ | {
        "PYTHON": sys.executable,
        "OUTPUT_BASEPATH": str(folder),
        "RUN_NAME": name,
        "MODEL_SIZE": "tiny",
        "DATASET_PATH": "mock",
        "LAYER_TYPE_LIST": "123N",
        "LA_MODULE": "gated_deltanet,gla,linear_attention",
        "SEQ_LEN": "256",
        "TRAIN_ITERS": "6",
        "SAVE_INTERVAL": "3",
        "WARMUP_ITERS": "1",
        "EVAL_ITERS": "0",
        "LR": "1e-3",
        "GPUS_PER_NODE": "1",
    }
    run = subprocess.run(
        ["sh", str(SCRIPT)],
        env=environment | variables,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def test_the_script_trains_and_resumes_in_bf16(tmp_path):
    steps = train(tmp_path, "whole", PACK="true", AC="sel")
    assert steps[-1]["lm_loss"] < steps[0]["lm_loss"]
    train(tmp_path, "parts", PACK="true", AC="sel", EXTRA_ARGS="--exit-interval 3")
    resumed = train(tmp_path, "parts", PACK="true", AC="sel")
    for whole, part in zip(steps, resumed, strict=True):
        assert part["lm_loss"] == pytest.approx(whole["lm_loss"], rel=1e-3)


@pytest.mark.parametrize(
    "mixers", ["mom_gated_deltanet,rwkv7,mamba2", "hgrn2,kda,gsa", "rwkv6,deltanet,mom_gla"]
)
def test_the_script_trains_every_kind_of_mixer(tmp_path, mixers):
    steps = train(tmp_path, "run", PACK="true", LA_MODULE=mixers, SAVE_INTERVAL="0")
    assert steps[-1]["lm_loss"] < steps[0]["lm_loss"]
