"""Exported folders, opened by transformers in a process where linear_moe and megatron cannot be imported.

The truth is our model: its logits, and the text that it chooses one token at a time from whole forward passes.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from linear_moe import lsm
from tests.checkpoint.remote_behaviours import BEHAVIOURS
from tests.checkpoint.remote_models import of_family, of_mixers, write_exported_run, write_folders
from tests.training.tiny import train

E4 = ["--moe-router-score-function", "sigmoid", "--moe-router-enable-expert-bias"]
SHARED = ["--moe-shared-expert-intermediate-size", "40", "--moe-shared-expert-gate"]
LLAMA3_ROPE = ["--use-rope-scaling", "--rope-scaling-factor", "8.0", "--qk-layernorm"]
OPTIONS = [
    *(
        "--gla-conv-size",
        "4",
        "--gla-conv-bias",
        "true",
        "--gla-output-norm",
        "groupnorm",
        "--mamba2-num-groups",
        "2",
    ),
    *("--linear-attention-feature-map", "hedgehog", "--linear-attention-normalize", "true"),
    *("--mom-kda-single-projection", "true", "--mom-kda-num-memories", "3", "--mom-gated-deltanet-topk", "1"),
    *(
        "--mom-gated-deltanet-shared-memory",
        "false",
        "--rwkv6-conv-size",
        "3",
        "--deltanet-output-gate",
        "swish",
    ),
]
FAMILIES = {
    "deepseek_v2": of_family("deepseek_v2", "tiny", ["softmax", "gla", "softmax"]),
    "llama3": of_family("llama3", "tiny", ["softmax", "retention"], *LLAMA3_ROPE),
    "mixtral": of_family("mixtral", "tiny", ["gated_deltanet", "softmax"]),
    "no_feed_forward": of_family("mamba2", "tiny", ["gla", "softmax"]),
    "qwen2": of_family("qwen2", "tiny", ["mom_gla", "softmax"], *SHARED),
    "qwen2_dense": of_family("qwen2", "tiny-dense", ["mamba2", "softmax"]),
    "tied": [flag for flag in of_family("llama3", "tiny", ["deltanet"]) if "untie" not in flag],
    "sigmoid_router": of_family("mixtral", "tiny", ["softmax", "rwkv6"], *E4),
}
CONFIG = Path(lsm.__file__).parents[1] / "checkpoint" / "remote" / "model" / "configuration_linear_moe.py"
HYBRIDS = 3
"""Models that have every mixer beside softmax attention between them."""
CASES = [*(f"hybrid {i}" for i in range(HYBRIDS)), "options", "behaviours", "exported_run"]
BEHAVIOUR_KINDS = ["rwkv7", "softmax", "hgrn2", "gated_deltanet", "rwkv7", "hgrn2"]


@pytest.fixture(scope="module")
def results(tmp_path_factory, _pool):
    """What the other process found, by folder and by behaviour."""
    root = tmp_path_factory.mktemp("exported")
    cases = {name: of_mixers([name, name]) for name in lsm.names()} | FAMILIES
    kinds = ["gla", "mamba2", "linear_attention", "mom_kda", "mom_gated_deltanet", "rwkv6", "deltanet"]
    cases["options"] = of_mixers(kinds, *OPTIONS)
    cases |= {f"hybrid {i}": of_mixers([*lsm.names()[i::HYBRIDS], "softmax"]) for i in range(HYBRIDS)}
    cases["behaviours"] = of_mixers(BEHAVIOUR_KINDS, "--num-query-groups", "2", moe=True)
    _pool.run(1, write_folders, root, cases, timeout=280)
    run = root / "run"
    saving = ["--run-dir", str(run), "--save", str(run / "checkpoint"), "--train-iters", "1"]
    flags = ["--lr-warmup-iters", "0", "--hidden-size", "64", "--lr", "0.1"]
    _pool.run(1, train, of_mixers(["hgrn2", "softmax", "mamba2"], *saving, *flags, moe=True))
    _pool.run(1, write_exported_run, run, root / "exported_run")
    folders = {"HF_HOME": str(root / "home"), "HF_MODULES_CACHE": str(root / "modules")}
    environment = os.environ | folders | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, str(Path(__file__).with_name("remote_reader.py")), str(root)]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    configs = [json.loads((root / name / "config.json").read_text()) for name in cases]
    written = sorted({name for config in configs for name in config})
    return json.loads((root / "results.json").read_text()) | {"written": written}


@pytest.mark.parametrize("case", [*lsm.names(), *FAMILIES, *CASES])
def test_the_exported_model_is_ours(results, case):
    found = results[case]
    assert "error" not in found, found["error"]
    assert found["logits"] < 1e-4
    assert found["tokens"], "other greedy tokens"
    assert found["chunked"], "a prompt read in chunks gives other tokens"
    assert found["left"] < 1e-4, "left padding is visible"
    assert found["right"] < 1e-4, "right padding is visible"
    assert found["saved"], "save_pretrained changes the model"


@pytest.mark.parametrize("behaviour", [behaviour.__name__ for behaviour in BEHAVIOURS])
def test_transformers_can_use_it(results, behaviour):
    assert "error" not in results[behaviour], results[behaviour]["error"]


def test_what_the_config_declares_is_what_export_writes(results):
    """Besides what transformers itself has: nothing that a reader would take for a fact of the model is left empty."""
    (config,) = (node for node in ast.parse(CONFIG.read_text()).body if isinstance(node, ast.ClassDef))
    declared = {field.target.id for field in config.body if isinstance(field, ast.AnnAssign)}
    of_tokens = {"pad_token_id", "bos_token_id", "eos_token_id"}  # in generation_config.json
    of_all_models = {"architectures", "auto_map", "model_type", "dtype"}
    assert {*results["written"]} - of_all_models == declared - of_tokens
