"""Model families: logits of each size's switches against Hugging Face's class, published counts."""

import pytest
import torch

from linear_moe.model.families import FAMILIES
from tests.model.family_models import PUBLISHED, huggingface_count, ours, shrunken, theirs

COUNTS = {
    ("qwen2", "0.5B"): 494_032_768,
    ("qwen2", "1.5B"): 1_543_714_304,
    ("qwen2", "7B"): 7_615_616_512,
    ("qwen2", "72B"): 72_706_203_648,
    ("deepseek_v2", "A2.4B"): 15_706_484_224,
    ("deepseek_v2", "A21B"): 235_741_434_880,
    ("mixtral", "8x7B"): 46_702_792_704,
    ("llama3", "1B"): 1_235_814_400,
    ("llama3", "8B"): 8_030_261_248,
    ("mamba2", "130M"): 128_989_632,
    ("mamba2", "2.7B"): 2_702_599_680,
}
"""Parameters as the model cards on Hugging Face state them; Mamba2's are rounded there."""


def test_models_are_those_of_huggingface(gloo):
    cases = [(FAMILIES[family], shrunken(FAMILIES[family].sizes[size])) for family, size in PUBLISHED]
    (found,) = gloo(1, ours, cases)
    for (family, size), (weights, logits), name in zip(cases, found, PUBLISHED, strict=True):
        expected = theirs(family, size, weights)
        assert expected.std() > 0.1, name
        torch.testing.assert_close(
            logits, expected, atol=1e-5, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize(("family", "size"), COUNTS)
def test_huggingface_counts_what_is_published(family, size):
    assert huggingface_count(family, size) == COUNTS[family, size]
