"""Models that transformers has a class for, exported with our code; and options of Megatron that neither knows."""

from pathlib import Path

import pytest
import torch
import transformers

from tests.checkpoint.hf_models import MODELS, hf_logits, save_hf, some_tokens
from tests.inference.models import argv
from tests.workers import leave_model_parallel


def with_our_code(rank, world, folder, name):
    from linear_moe.checkpoint.exporting import export_model
    from linear_moe.checkpoint.importing import import_model

    save_hf(folder / "hf", name)
    import_model(folder / "hf", folder / "run")
    try:
        return export_model(folder / "run", folder / name, native=False).architecture
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("name", [name for name in MODELS if not name.endswith("-tied")])
def test_our_code_computes_what_their_class_does(gloo, tmp_path: Path, name):
    found = gloo(1, with_our_code, tmp_path, name)[0]
    if name.startswith("qwen3_next"):
        plain = "layernorm_zero_centered_gamma=True, attention_output_gate=True"
        assert found.startswith(f"the model cannot be exported with {plain}\n  why: ")
        return
    assert found == "LinearMoeForCausalLM"
    load = transformers.AutoModelForCausalLM.from_pretrained
    _, told = load(tmp_path / name, trust_remote_code=True, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"], "a new tensor may change nothing, yet"
    ours = hf_logits(tmp_path / name, some_tokens(), trust_remote_code=True)
    torch.testing.assert_close(ours, hf_logits(tmp_path / "hf", some_tokens()), rtol=0, atol=1e-5)


OPTIONS = {
    "layernorm_zero_centered_gamma": "--apply-layernorm-1p",
    "attention_output_gate": "--attention-output-gate",
    "qk_l2_norm": "--qk-l2-norm",
    "rotary_interleaved": "--rotary-interleaved",
    "no_rope_freq": "--no-rope-freq 2",
    "activation_func_clamp_value": "--activation-func-clamp-value 7",
    "glu_linear_offset": "--glu-linear-offset 1.0",
    "position_embedding_type": "--position-embedding-type none",
    "seq_len_interpolation_factor": "--rotary-seq-len-interpolation-factor 2",
    "normalization": "--normalization LayerNorm",
    "apply_residual_connection_post_layernorm": "--apply-residual-connection-post-layernorm",
    "activation_func": "--quick-geglu",
    "moe_apply_probs_on_input": "--moe-apply-probs-on-input --moe-router-topk 1",
    "moe_router_load_balancing_type": "--moe-router-load-balancing-type sinkhorn",
    "moe_router_score_function": "--moe-router-score-function sqrtsoftplus",
}
"""What is refused, and the flags that make it so; all else of the model is Qwen2's."""

SHARED = ["--moe-shared-expert-intermediate-size", "40", "--moe-shared-expert-gate"]


def refusals(rank, world):
    from linear_moe.checkpoint.blueprint import blueprint
    from linear_moe.checkpoint.exporting import _architecture

    found = {}
    for name, flags in {"": "", "moe_": "", **OPTIONS}.items():
        is_moe = name.startswith("moe_")
        words = [*argv(["softmax"] * 2, moe=is_moe), *(SHARED if is_moe else []), *flags.split()]
        words = [word for word in words if word != "--swiglu" or name != "activation_func"]
        try:
            found[name] = _architecture(blueprint(words, padded_vocab_size=128), "float32", 128, None, True)[
                0
            ]
        except ValueError as error:
            found[name] = str(error)
        leave_model_parallel()
    return found


def test_options_that_neither_knows_are_refused_by_name(gloo):
    """Each of them alone: the class of transformers, which fits in all that it has fields for, is not taken either."""
    found = gloo(1, refusals)[0]
    assert (found.pop(""), found.pop("moe_")) == ("qwen2", "qwen2_moe")
    for name, told in found.items():
        assert f"the model cannot be exported with {name}=" in told, (name, told)


def with_a_capacity(rank, world):
    from linear_moe.checkpoint.blueprint import blueprint
    from linear_moe.checkpoint.remote import hf_config

    model = blueprint(argv(["mom_gla"] * 2, "--mom-capacity", "1.0"), padded_vocab_size=128)
    return hf_config(model.config, vocab_size=128, dtype="float32")["mixers"]["mom_gla"]


def test_a_memory_takes_all_of_its_tokens(gloo):
    """A capacity is of a training's batch: what a model reads must not depend on the other rows of a call."""
    options = gloo(1, with_a_capacity)[0]
    assert options["capacity"] is None and options["topk"] and "gate_rank" in options
