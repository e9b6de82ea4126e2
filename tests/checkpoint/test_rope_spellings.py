"""Rotary positions mean what transformers takes them for, however a config.json spells them, or they are refused."""

import json
from typing import Any

import pytest
import torch

from linear_moe.checkpoint.hf_config import describe
from linear_moe.checkpoint.native import native_config
from tests.checkpoint.test_import_configs import PUBLISHED

MODELS = {
    "llama": "Llama-3.1-8B",
    "mixtral": "Mixtral-8x7B-v0.1",
    "deepseek_v2": "DeepSeek-V2-Lite",
    "qwen2": "Qwen2-7B",
}
FIELDS = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")
LLAMA3 = PUBLISHED["Llama-3.1-8B"][0]["rope_scaling"]
YARN = PUBLISHED["DeepSeek-V2-Lite"][0]["rope_scaling"]
PLAIN = {"rope_type": "default", "rope_theta": 3e5}


def without(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


SAME: list[tuple[str, dict[str, Any]]] = [
    ("mixtral", {}),  # a base of its own where the file has none
    ("llama", {}),
    ("qwen2", {"rope_parameters": {"rope_theta": 2e6}}),
    ("llama", {"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5}),
    ("llama", {"rope_parameters": PLAIN, "rope_theta": 5e5}),
    ("llama", {"rope_parameters": PLAIN, "rope_scaling": LLAMA3, "rope_theta": 5e5}),
    ("llama", {"rope_parameters": {}, "rope_theta": 5e5}),
    ("llama", {"rope_scaling": LLAMA3 | {"rope_theta": 3e5}, "rope_theta": 5e5}),
    ("llama", {"rope_scaling": without(LLAMA3, "rope_type") | {"type": "llama3"}}),
    (
        "llama",
        {
            "rope_scaling": without(LLAMA3, "original_max_position_embeddings"),
            "max_position_embeddings": 8192,
        },
    ),
    ("deepseek_v2", {"rope_scaling": YARN | {"attention_factor": None}}),
    ("deepseek_v2", {"rope_parameters": YARN | {"rope_type": "yarn", "rope_theta": 3e4}}),
]

OTHER: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rope_scaling": without(LLAMA3, "original_max_position_embeddings")}),
    ("llama", {"rope_scaling": LLAMA3, "original_max_position_embeddings": 4096}),
    ("llama", {"rope_scaling": LLAMA3, "rope_theta": 10_000.5}),
    ("llama", {"rope_scaling": LLAMA3, "partial_rotary_factor": 0.5}),
    ("llama", {"rope_parameters": {"full_attention": PLAIN}}),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 8.0}}),
    ("llama", {"rope_scaling": LLAMA3 | {"rope_type": "dynamic"}}),
    ("llama", {"rope_scaling": YARN}),
    ("qwen2", {"rope_scaling": LLAMA3}),
    ("deepseek_v2", {"rope_scaling": YARN | {"type": "linear"}}),
    ("deepseek_v2", {"rope_scaling": YARN | {"beta_fast": 16}}),
    ("deepseek_v2", {"rope_scaling": without(YARN, "mscale")}),
    ("deepseek_v2", {"rope_scaling": YARN | {"mscale_all_dim": 0}}),
    ("deepseek_v2", {"rope_scaling": YARN | {"truncate": False}}),
    ("deepseek_v2", {"rope_scaling": YARN | {"attention_factor": 1.5}}),
    ("deepseek_v2", {"rope_scaling": without(YARN, "original_max_position_embeddings")}),
]


def spelled(kind: str, changes: dict[str, Any]) -> dict[str, Any]:
    """A fresh copy: transformers writes into what it is given."""
    return json.loads(json.dumps(without(PUBLISHED[MODELS[kind]][0], *FIELDS) | changes))


def frequencies(config: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """As a model of transformers has them."""
    import transformers
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rotary = LlamaRotaryEmbedding(transformers.AutoConfig.for_model(**config))
    return rotary.inv_freq, rotary.attention_scaling


@pytest.mark.parametrize(("kind", "changes"), SAME)
def test_read_as_transformers_reads_them(kind, changes):
    described = describe(spelled(kind, changes))
    again = native_config(kind, described.family, described.size, dtype="float32")
    (ours, scale), (theirs, their_scale) = frequencies(again), frequencies(spelled(kind, changes))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert scale == pytest.approx(their_scale)


@pytest.mark.parametrize(("kind", "changes"), OTHER)
def test_refused(kind, changes):
    with pytest.raises(ValueError, match=r"has rotary positions of type .*\n  why: .*\n  try: "):
        describe(spelled(kind, changes))
