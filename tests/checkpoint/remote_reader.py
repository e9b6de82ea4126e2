"""Opens exported folders with transformers where linear_moe and megatron cannot be imported; says what it found.

python tests/checkpoint/remote_reader.py ROOT        prints one JSON object, by folder
"""

import json
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

for blocked in ("linear_moe", "megatron", "fla"):
    sys.modules[blocked] = None  # type: ignore[assignment]
sys.path = [entry for entry in sys.path if entry and not (Path(entry) / "linear_moe").exists()]

import remote_behaviours  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

PAD = 0


def read(folder: Path) -> dict[str, Any]:
    """Largest differences and equalities of one folder."""
    expected = torch.load(folder / "expected.pt")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    assert (
        model.config_class.__name__
        == type(AutoConfig.from_pretrained(folder, trust_remote_code=True)).__name__
    )
    prompts, logits, tokens = expected["prompts"], expected["logits"], expected["tokens"]
    with torch.no_grad():
        alone = [model(torch.tensor([prompt])).logits[0] for prompt in prompts]
    assert len({token for row in tokens for token in row}) > len(tokens), "our model says one thing"
    found = {"logits": max(_difference(a, b) for a, b in zip(alone, logits, strict=True))}
    found["left"] = _padded(model, prompts, alone, left=True)
    found["right"] = _padded(model, prompts, alone, left=False)
    ids, mask = _batch(prompts, left=True)
    options = {"max_new_tokens": len(tokens[0]), "do_sample": False, "pad_token_id": PAD}
    out = model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :]
    found["tokens"] = out.tolist() == tokens
    in_chunks = model.generate(
        ids, attention_mask=mask, prefill_chunk_size=6, **options | {"max_new_tokens": 8}
    )
    found["chunked"] = in_chunks[:, ids.shape[1] :].equal(out[:, :8])
    found["saved"] = _saved(model, folder, expected["keys"], logits[0], prompts[0])
    return found


def _padded(model: Any, prompts: list[list[int]], alone: list[torch.Tensor], left: bool) -> float:
    """Of rows in a padded batch from the same rows alone."""
    ids, mask = _batch(prompts, left)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
    assert logits.isfinite().all()
    return max(_difference(logits[i][mask[i].bool()], row) for i, row in enumerate(alone))


def _batch(prompts: list[list[int]], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, prompts))
    rows, masks = [], []
    for prompt in prompts:
        pads = longest - len(prompt)
        rows.append([PAD] * pads + prompt if left else prompt + [PAD] * pads)
        masks.append([0] * pads + [1] * len(prompt) if left else [1] * len(prompt) + [0] * pads)
    return torch.tensor(rows), torch.tensor(masks)


def _saved(model: Any, folder: Path, keys: list[str], logits: torch.Tensor, prompt: list[int]) -> bool:
    """Saved by transformers it has the same tensors, bit for bit, and can be opened again."""
    copy = folder.parent / f"{folder.name}_saved"
    model.save_pretrained(copy)
    first, second = load_file(folder / "model.safetensors"), load_file(copy / "model.safetensors")
    same = sorted(second) == keys and all(second[key].equal(first[key]) for key in keys)
    shutil.rmtree(copy / "__pycache__", ignore_errors=True)
    code = {path.name for path in folder.glob("*.py")} == {path.name for path in copy.glob("*.py")}
    again = AutoModelForCausalLM.from_pretrained(copy, trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        opened_again = again(torch.tensor([prompt])).logits[0]
    return same and code and _difference(opened_again, logits) < 1e-4


def _difference(found: torch.Tensor, truth: torch.Tensor) -> float:
    assert found.shape == truth.shape, (found.shape, truth.shape)
    return (found - truth).abs().max().item()


def _outcome(function: Callable[[Path], Any], folder: Path) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        found = function(folder) or {}
    except Exception:
        found = {"error": traceback.format_exc()}
    return found | {"seconds": round(time.perf_counter() - start, 2)}


def main(root: Path) -> None:
    torch.set_num_threads(1)
    results = {}
    for path in sorted(root.glob("*/expected.pt")):
        results[path.parent.name] = _outcome(read, path.parent)
    for behaviour in remote_behaviours.BEHAVIOURS:
        if (root / "behaviours").exists():
            results[behaviour.__name__] = _outcome(behaviour, root / "behaviours")
    (root / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
