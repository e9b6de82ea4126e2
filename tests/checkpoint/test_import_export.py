"""Hugging Face -> us -> Hugging Face: every tensor and the config as they were, and the same logits on the way."""

import json
from pathlib import Path

import pytest
import torch

from tests.checkpoint.hf_models import MODELS, VOCAB, hf_logits, save_hf, some_tokens
from tests.inference.models import whole_forward


def there_and_back(rank, world, folder, name, dtype):
    """Import, logits of ours, export; what must be equal is compared here."""
    from linear_moe.checkpoint.exporting import export_model
    from linear_moe.checkpoint.hf_folder import stored_tensors
    from linear_moe.checkpoint.importing import import_model
    from linear_moe.inference.load import load_model

    source, run, back = (Path(folder) / part for part in ("hf", "run", "back"))
    save_hf(source, name, dtype=dtype)
    import_model(source, run)
    exported = export_model(run, back, shard_bytes=50_000)
    before, after = stored_tensors(source), stored_tensors(back)
    assert before.keys() == after.keys()
    for key, stored in before.items():
        there, again = stored.read(key), after[key].read(key)
        assert there.dtype == again.dtype == dtype and torch.equal(there, again), key
    logits = whole_forward(load_model(run, dtype=torch.float32).model, some_tokens())[..., :VOCAB]
    return logits, exported.architecture, exported.is_native


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(gloo, tmp_path, name):
    logits, architecture, is_native = gloo(1, there_and_back, str(tmp_path), name, torch.float32)[0]
    assert is_native and architecture == MODELS[name][0] + "ForCausalLM"
    theirs = hf_logits(tmp_path / "hf", some_tokens())
    assert theirs.std() > 0.05
    torch.testing.assert_close(logits, theirs, rtol=0, atol=1e-5)
    configs = [json.loads((tmp_path / part / "config.json").read_text()) for part in ("hf", "back")]
    assert configs[0] == configs[1]
