"""Tiny models of ours and what they say, as folders that another process opens with transformers alone.

The names of softmax layers and experts are spelled out here a second time, on purpose: they are the truth of the test.

Letters: B prompts, T tokens, V vocabulary, D hidden, E experts, G key heads.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NEW_TOKENS = 16


def write_folders(rank: int, world: int, root: Path, cases: dict[str, tuple[list[str], list[str]]]) -> None:
    """A folder for each case, ``(layer kinds, flags)``, with what our model says in ``expected.pt``."""
    from tests.workers import leave_model_parallel

    for name, (kinds, flags) in cases.items():
        try:
            write_folder(root / name, kinds, flags)
        except Exception as error:
            error.add_note(f"in case {name}")
            raise
        leave_model_parallel()


def write_folder(folder: Path, kinds: list[str], flags: list[str], new_tokens: int = NEW_TOKENS) -> Any:
    """The exported model and what ours says; returns ours."""
    from safetensors.torch import save_file

    from linear_moe.checkpoint import remote
    from linear_moe.inference.generate import generate

    loaded = our_model(kinds, flags)
    folder.mkdir(parents=True)
    config = remote.hf_config(loaded.config, vocab_size=128, dtype="float32")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text("{}")
    remote.write_code(folder, config)
    state = exported(loaded.model, loaded.config.transformer)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    rows = [row.tolist() for row in torch.randint(0, 127, (3, 20), generator=torch.Generator().manual_seed(7))]
    prompts = [rows[0], rows[1][:7], rows[2][:13]]
    logits, tokens = [], []
    for prompt in prompts:
        tokens_1T = torch.tensor([prompt])
        with torch.no_grad():
            logits.append(loaded.model(tokens_1T, torch.arange(len(prompt))[None], None)[0])
        tokens += generate(loaded, [prompt], max_new_tokens=new_tokens)
    torch.save({"prompts": prompts, "logits": logits, "tokens": tokens, "keys": sorted(state)}, folder / "expected.pt")
    return loaded


def our_model(kinds: list[str], flags: list[str]) -> Any:
    """As ``load_model`` gives it, float32, with random weights that make it decided."""
    from tests.inference.models import random_model

    moe = "--num-experts" not in flags and "--dense" not in flags
    flags = [flag for flag in flags if flag != "--dense"]
    loaded = random_model(kinds, *flags, moe=moe, dtype=torch.float32)
    if not loaded.config.share_embeddings_and_output_weights:
        # Logits of padding rows: no token of the vocabulary.
        loaded.model.output_layer.weight.data[127] = 0
    return loaded


def exported(model: Any, config: Any) -> dict[str, Tensor]:
    """Our tensors under the names of an exported folder."""
    ours = {name: x.detach() for name, x in model.state_dict().items() if isinstance(x, Tensor)}
    found = {
        "model.embed_tokens.weight": ours["embedding.word_embeddings.weight"],
        "model.norm.weight": ours["decoder.final_layernorm.weight"],
    }
    if "output_layer.weight" in ours:
        found["lm_head.weight"] = ours["output_layer.weight"]
    for i, kind in enumerate(config.layer_kinds):
        prefix = f"decoder.layers.{i}."
        layer = {name.removeprefix(prefix): x for name, x in ours.items() if name.startswith(prefix)}
        named = {
            "input_layernorm.weight": layer["input_layernorm.weight"],
            "post_attention_layernorm.weight": layer["pre_mlp_layernorm.weight"],
        }
        if kind != "softmax":
            found |= _tables(kind, ours, config)
            named |= _mixer(kind, layer, config, config.layer_kinds[:i].count(kind))
        elif config.multi_latent_attention:
            named |= _latent(layer)
        else:
            named |= _attention(layer, config)
        named |= _feed_forward(layer)
        found |= {f"model.layers.{i}.{name}": x for name, x in named.items()}
    return {name: x.clone().contiguous() for name, x in found.items()}


def _mixer(kind: str, layer: dict[str, Tensor], config: Any, layer_of_kind: int) -> dict[str, Tensor]:
    from linear_moe import lsm
    from linear_moe.checkpoint import remote
    from linear_moe.model.config import mixer_config

    rows = remote.mixer_rows(lsm.get(kind)(mixer_config(kind, config)), layer_of_kind)
    used = {row.key for row in rows}
    own = {name.removeprefix("self_attention.") for name in layer if name.startswith("self_attention.")}
    assert used == {name for name in own if not name.endswith("_extra_state")}, (used, own)
    return {f"mixer.{row.name}": row.exported(layer[f"self_attention.{row.key}"]) for row in rows}


def _tables(kind: str, ours: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    from linear_moe import lsm
    from linear_moe.checkpoint import remote
    from linear_moe.model.config import mixer_config

    rows = remote.model_rows(lsm.get(kind)(mixer_config(kind, config)))
    return {f"model.tables.{kind}.{row.name}": row.exported(ours[f"{kind}_tables.{row.key}"]) for row in rows}


def _attention(layer: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    found = {"self_attn.o_proj.weight": layer["self_attention.linear_proj.weight"]}
    groups, width = config.num_query_groups, config.kv_channels
    queries = config.num_attention_heads // groups
    for kind in ("weight", "bias"):
        fused = layer.get(f"self_attention.linear_qkv.{kind}")
        if fused is not None:
            parts = fused.unflatten(0, (groups, queries + 2, width)).split([queries, 1, 1], dim=1)
            for name, part in zip("qkv", parts, strict=True):
                found[f"self_attn.{name}_proj.{kind}"] = part.flatten(0, 2)
    for name in "qk":
        if f"self_attention.{name}_layernorm.weight" in layer:
            found[f"self_attn.{name}_norm.weight"] = layer[f"self_attention.{name}_layernorm.weight"]
    return found


def _latent(layer: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {
        "linear_q_proj": "q_proj",
        "linear_q_down_proj": "q_a_proj",
        "q_layernorm": "q_a_layernorm",
        "linear_q_up_proj": "q_b_proj",
        "linear_kv_down_proj": "kv_a_proj_with_mqa",
        "kv_layernorm": "kv_a_layernorm",
        "linear_kv_up_proj": "kv_b_proj",
        "linear_proj": "o_proj",
    }
    return {
        f"self_attn.{theirs}.weight": layer[f"self_attention.{ours}.weight"]
        for ours, theirs in names.items()
        if f"self_attention.{ours}.weight" in layer
    }


def _feed_forward(layer: dict[str, Tensor]) -> dict[str, Tensor]:
    if "mlp.linear_fc1.weight" in layer:
        return _gated("mlp", layer["mlp.linear_fc1.weight"], layer["mlp.linear_fc2.weight"])
    found = {"mlp.gate.weight": layer["mlp.router.weight"]}
    if "mlp.router.expert_bias" in layer:
        found["mlp.gate.e_score_correction_bias"] = layer["mlp.router.expert_bias"]
    experts = zip(layer["mlp.experts.fc1_weight"], layer["mlp.experts.fc2_weight"], strict=True)
    for e, (first, second) in enumerate(experts):
        found |= _gated(f"mlp.experts.{e}", first, second)
    if "mlp.shared_experts.linear_fc1.weight" in layer:
        shared = (layer[f"mlp.shared_experts.linear_{name}.weight"] for name in ("fc1", "fc2"))
        found |= _gated("mlp.shared_expert", *shared)
    if "mlp.shared_experts.gate_weight" in layer:
        found["mlp.shared_expert_gate.weight"] = layer["mlp.shared_experts.gate_weight"]
    return found


def _gated(name: str, first: Tensor, second: Tensor) -> dict[str, Tensor]:
    gate, up = first.chunk(2)
    return {
        f"{name}.gate_proj.weight": gate,
        f"{name}.up_proj.weight": up,
        f"{name}.down_proj.weight": second,
    }
