"""Decoding of latent attention: what is kept is compressed, and every step gives what the whole sequence gives."""

import pytest
import torch
from torch import Tensor

from linear_moe.model.families import FAMILIES
from tests.model.family_models import build, shrunken, tokens

FAMILY = FAMILIES["deepseek_v2"]
LENGTHS = [11, 7]
STEPS = 20


def decode(rank: int, world: int, size_name: str, flags: list[str]) -> dict[str, Tensor]:
    """Logits after prompts of two lengths and after every further token, and of the whole rows."""
    from linear_moe.inference.decoder import Decoder
    from tests.workers import leave_model_parallel

    size = shrunken(FAMILY.sizes[size_name])
    parallel = ["--tensor-model-parallel-size", str(world)]
    model = build(FAMILY, size, ["softmax", "gla", "softmax"], *parallel, *flags, dtype=torch.float64)
    rows_BT, found = tokens(), []
    positions_BT = torch.arange(rows_BT.shape[1]).expand_as(rows_BT)
    with torch.no_grad():
        whole_BTV = model(rows_BT, positions_BT, None, runtime_gather_output=True)
    decoder = Decoder(model, *rows_BT.shape)
    found.append(decoder.read([row[:n] for row, n in zip(rows_BT, LENGTHS, strict=True)], chunk=8))
    for step in range(STEPS):
        found.append(
            decoder.step(torch.stack([row[n + step] for row, n in zip(rows_BT, LENGTHS, strict=True)]))
        )
    expected = [whole_BTV[row, n - 1 : n + STEPS] for row, n in enumerate(LENGTHS)]
    kept = sum(
        x.shape[1:].numel()
        for held in decoder.context.key_value_memory_dict.values()
        for x in getattr(held, "tensors", ())
    )
    leave_model_parallel()
    width = size.kv_lora_rank + size.qk_pos_emb_head_dim
    return {
        "found": torch.stack(found, 1), "expected": torch.stack(expected), "kept": kept,
        "width": 2 * width * decoder.context.max_sequence_length,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("size", "world", "flags"),
    [
        ("A2.4B", 1, ["--mscale", "1.5"]),  # the rotary table has a factor of its own
        ("A2.4B", 1, ["--rope-type", "rope"]),
        ("A21B", 1, []),
        ("A21B", 2, []),
    ],
)
def test_every_step_is_the_whole_sequence(gloo, size, world, flags):
    seen = gloo(world, decode, size, flags)[0]
    torch.testing.assert_close(
        seen["found"], seen["expected"], atol=1e-6, rtol=1e-6
    )  # rotary tables are float32
    assert seen["kept"] == seen["width"], "compressed keys and values of two layers, nothing per head"
