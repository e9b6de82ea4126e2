"""Options of Megatron that the code of an exported folder does not know: each exists, and each is refused."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from linear_moe.checkpoint.remote.describe import PLAIN, hf_config
from linear_moe.model.config import LinearMoEConfig


def test_each_exists_and_is_refused():
    """An option that Megatron has renamed would count as its plain value, in silence."""
    assert PLAIN.keys() <= {field.name for field in dataclasses.fields(LinearMoEConfig)}
    plain = {name: values[-1] for name, values in PLAIN.items()}
    common = {"activation_func": torch.nn.functional.silu, "layer_kinds": [], "multi_latent_attention": False}
    given = {"position_embedding_type": "rope", "seq_len_interpolation_factor": None}
    cases = [({name: "other"}, {}, f"{name}='other'") for name in PLAIN]
    cases += [({}, {"seq_len_interpolation_factor": 2}, "seq_len_interpolation_factor=2")]
    cases += [
        ({}, {"position_embedding_type": "learned_absolute"}, "position_embedding_type='learned_absolute'")
    ]
    cases += [
        ({"moe_router_load_balancing_type": name}, {}, f"type='{name}'")
        for name in ("sinkhorn", "quantile_balancing")
    ]
    for changes, more, text in cases:
        config = SimpleNamespace(**(plain | common | changes))
        model = SimpleNamespace(transformer=config, **(given | more))
        with pytest.raises(ValueError) as refused:
            hf_config(model, vocab_size=8, dtype="float32")  # type: ignore[arg-type]
        told = str(refused.value).splitlines()[0]
        assert told.endswith(text) and "," not in told
