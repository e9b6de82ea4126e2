"""A run without a run script, which leaves sizes to Megatron, is exported, and imported again as the same model."""

import json
from pathlib import Path

from tests.checkpoint.hf_models import some_tokens
from tests.inference.models import argv, whole_forward
from tests.training.tiny import train

DEFAULTS = ("--kv-channels", "--rotary-base", "--norm-epsilon", "--ffn-hidden-size")
PATTERN = ["--la-module", "gla", "--layer-type-list", "LN"]


def there_and_back(rank, world, folder):
    import torch

    from linear_moe.checkpoint.exporting import export_model
    from linear_moe.checkpoint.importing import import_model
    from linear_moe.inference.load import load_model

    assert not export_model(folder / "run", folder / "hf").is_native
    kinds = import_model(folder / "hf", folder / "again").kinds
    tokens = [[token % 127 for token in row] for row in some_tokens()]
    logits = [whole_forward(load_model(folder / name).model, tokens) for name in ("run", "again")]
    return kinds, torch.equal(*logits)


def test_sizes_that_megatron_chose(gloo, tmp_path: Path):
    run = tmp_path / "run"
    words = argv(["gla", "softmax"], "--run-dir", str(run), "--save", str(run / "checkpoint"))
    for flag in (*DEFAULTS, "--layer-kinds"):
        while flag in words:
            place = words.index(flag)
            del words[place : place + 2]
    gloo(1, train, [*words, *PATTERN, "--train-iters", "1", "--lr-warmup-iters", "0"])
    assert gloo(1, there_and_back, tmp_path)[0] == (("gla", "softmax"), True)
    arguments = json.loads((tmp_path / "hf" / "linear_moe_run.json").read_text())["arguments"]
    assert all(arguments.count(flag) == 1 for flag in DEFAULTS)
