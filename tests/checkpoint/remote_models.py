"""Tiny models of ours and what they say, as folders that another process opens with transformers alone.

The names of softmax layers and experts are spelled out here a second time, on purpose: they are the truth of the test.

Letters: B prompts, T tokens, V vocabulary, D hidden, E experts, G key heads.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NEW_TOKENS = 64
"""Greedy ones, all of which have to be the same: more than a chunk of the scans."""
VOCAB = 128


def of_mixers(kinds: list[str], *flags: str, moe: bool = False) -> list[str]:
    """Command line of a tiny model with these layers."""
    from tests.inference.models import argv

    return argv(kinds, *flags, moe=moe)


def of_family(family: str, size: str, kinds: list[str], *flags: str) -> list[str]:
    """The same with a family's switches."""
    from linear_moe.model.families import FAMILIES, megatron_arguments
    from tests.training.tiny import ARGUMENTS

    tiny = replace(FAMILIES[family].sizes[size], num_layers=len(kinds), hidden_size=64, vocab_size=128)
    rest = ARGUMENTS[ARGUMENTS.index("--seq-length") :]
    return [
        *megatron_arguments(FAMILIES[family], tiny),
        *rest,
        *("--layer-kinds", ",".join(kinds), "--expert-tensor-parallel-size", "1", *flags),
    ]


def write_folders(rank: int, world: int, root: Path, cases: dict[str, list[str]]) -> None:
    """A folder for each command line, with what our model says in ``expected.pt``."""
    from tests.workers import leave_model_parallel

    for name, argv in cases.items():
        try:
            write_folder(root / name, argv)
        except Exception as error:
            error.add_note(f"in case {name}")
            raise
        leave_model_parallel()


def write_folder(folder: Path, argv: list[str], new_tokens: int = NEW_TOKENS, noise: float = 0.2) -> Any:
    """The exported model and what ours says; returns ours."""
    from safetensors.torch import save_file

    from linear_moe.checkpoint import remote

    loaded = our_model(argv, noise)
    folder.mkdir(parents=True)
    config = remote.hf_config(loaded.config, vocab_size=VOCAB, dtype="float32")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text("{}")
    remote.write_code(folder, config)
    state = exported(loaded.model, loaded.config.transformer)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    write_expected(folder, loaded.model, sorted(state), new_tokens)
    return loaded


def write_expected(folder: Path, model: Any, keys: list[str], new_tokens: int = NEW_TOKENS) -> None:
    """Prompts, logits, greedy text and names of tensors, beside the exported model."""
    from tests.inference.models import whole_forward

    rows = torch.randint(0, VOCAB, (3, 20), generator=torch.Generator().manual_seed(7)).tolist()
    prompts = [rows[0], rows[1][:7], rows[2][:13]]
    logits = [whole_forward(model, [prompt])[0] for prompt in prompts]
    tokens = chosen(model, prompts, new_tokens)
    expected = {"prompts": prompts, "logits": logits, "tokens": tokens, "keys": keys}
    torch.save(expected, folder / "expected.pt")


def write_exported_run(rank: int, world: int, run: Path, folder: Path) -> None:
    """The same of a run, through the export that people use."""
    from safetensors import safe_open

    from linear_moe.checkpoint.exporting import export_model
    from linear_moe.inference.load import load_model

    export_model(run, folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        keys = sorted(file.keys())
    write_expected(folder, load_model(run, dtype=torch.float32).model, keys)


def chosen(model: Any, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Greedy text by the definition, without any memory: of one whole forward pass, no token of which sees a later one,
    each token of the text is the most probable one behind those before it. How it was found proves nothing."""
    from linear_moe.inference.generate import generate
    from linear_moe.inference.load import LoadedModel
    from tests.inference.models import whole_forward

    loaded = LoadedModel(model, None, None, 0, VOCAB, None)  # type: ignore[arg-type]
    tokens = generate(loaded, prompts, max_new_tokens=count)
    for prompt, text in zip(prompts, tokens, strict=True):
        logits_TV = whole_forward(model, [prompt + text])[0, len(prompt) - 1 : -1, :VOCAB]
        assert logits_TV.argmax(-1).tolist() == text and len(text) == count
    return tokens


def our_model(argv: list[str], noise: float) -> Any:
    """As ``load_model`` gives it, float32, with random weights far from their initial values."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from linear_moe.inference.load import LoadedModel, join_single_process
    from linear_moe.inference.rebuild import single_process_arguments
    from linear_moe.model.builder import LinearMoEBuilder
    from linear_moe.training import arguments

    args = single_process_arguments(argv, padded_vocab_size=VOCAB, dtype=torch.float32)
    args.perform_initialization = True
    config = arguments.model_config(args)
    join_single_process()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = LinearMoEBuilder(config).build_model(groups, pre_process=True, post_process=True)
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data += noise * torch.randn_like(parameter)
    for name, buffer in model.named_buffers():
        if name.endswith("expert_bias"):
            buffer += noise * torch.randn_like(buffer)
    return LoadedModel(model.eval().requires_grad_(False), None, config, 0, VOCAB, None)


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
        named = {"input_layernorm.weight": layer["input_layernorm.weight"]}
        if kind != "softmax":
            found |= _tables(kind, ours, config)
            named |= _mixer(kind, layer, config, config.layer_kinds[:i].count(kind))
        elif config.multi_latent_attention:
            named |= _latent(layer)
        else:
            named |= _attention(layer, config)
        if "pre_mlp_layernorm.weight" in layer:
            named["post_attention_layernorm.weight"] = layer["pre_mlp_layernorm.weight"]
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
    found = {}
    for row in rows:
        x = layer[f"self_attention.{row.key}"]
        if row.start is not None:
            x = x.unflatten(0, (row.groups, -1))[:, row.start : row.stop].flatten(0, 1)
        found[f"mixer.{row.name}"] = x
    return found


def _tables(kind: str, ours: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    from linear_moe import lsm
    from linear_moe.model.config import mixer_config

    shared = [p.name for p in lsm.get(kind)(mixer_config(kind, config)).all_parameters() if p.per_model]
    return {f"model.tables.{kind}.{name}": ours[f"{kind}_tables.{name}"] for name in shared}


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
