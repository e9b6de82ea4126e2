"""A softmax model whose layers become mixers: what is carried over is equal, the rest neutral, and it trains."""

import json
from pathlib import Path

import pytest
import torch

from linear_moe import lsm
from tests.checkpoint.hf_models import MODELS, save_hf, some_tokens
from tests.inference.models import whole_forward
from tests.training.tiny import metrics, train

WHOLE = ["gated_deltanet", "gla", "retention", "mom_gated_deltanet", "gsa"]
"""Mixers that take over query, key, value and output."""


def linearised(rank, world, folder, mixer, options):
    """Import; tensors of the first layer by name, the table of origins, logits."""
    from linear_moe.checkpoint.hf_folder import stored_tensors
    from linear_moe.checkpoint.importing import import_model
    from linear_moe.checkpoint.torch_dist import Reader
    from linear_moe.inference.load import load_model

    source, run = Path(folder) / "hf", Path(folder) / "run"
    done = import_model(source, run, la_module=mixer, layer_type_list="LN", **options)
    reader = Reader(run / "checkpoint" / "iter_0000001")
    ours = {key: reader.read(key) for key in reader.tensors}
    theirs = {name: stored.read(name) for name, stored in stored_tensors(source).items()}
    loaded = load_model(run)
    logits = whole_forward(loaded.model, some_tokens())
    origins = {
        (o.pattern.removeprefix("decoder.layers.*."), *o.layers): (o.how, o.source) for o in done.origins
    }
    mixer_layer = loaded.model.decoder.layers[0].self_attention
    parts = mixer_layer._found()
    return ours, theirs, origins, logits, {name: part.clone() for name, part in parts.items()}


def converted(gloo, tmp_path, mixer, **options):
    gloo(1, source_model, str(tmp_path / "hf"))
    return gloo(1, linearised, str(tmp_path), mixer, options)[0]


def source_model(rank, world, folder):
    save_hf(folder, "qwen2_moe", num_experts_per_tok=2)


def repeated(weight, groups=2, heads=4):
    """Each key/value head for every query head that used it, by an explicit loop."""
    by_group = weight.reshape(groups, -1, *weight.shape[1:])
    return torch.cat([by_group[head // (heads // groups)] for head in range(heads)])


@pytest.mark.parametrize("mixer", WHOLE)
def test_what_is_carried(gloo, tmp_path, mixer):
    ours, theirs, origins, logits, parts = converted(gloo, tmp_path, mixer)
    attention = "model.layers.0.self_attn."
    prefix = "decoder.layers.0.self_attention."
    for name in "qkv":
        wanted = theirs[f"{attention}{name}_proj.weight"]
        wanted = wanted if name == "q" else repeated(wanted)
        assert torch.equal(parts[f"in_proj.{name}"].flatten(0, 1), wanted), name
        bias = theirs[f"{attention}{name}_proj.bias"]
        bias = bias if name == "q" else repeated(bias)
        assert torch.equal(ours[f"{prefix}{name}_bias"].flatten(), bias), name
    assert torch.equal(ours[f"{prefix}out_proj.weight"], theirs[f"{attention}o_proj.weight"])
    # everything that is not the first layer's attention is as it was
    assert torch.equal(ours["decoder.layers.0.mlp.router.weight"], theirs["model.layers.0.mlp.gate.weight"])
    down = torch.stack([theirs[f"model.layers.1.mlp.experts.{e}.down_proj.weight"] for e in range(4)])
    assert torch.equal(ours["decoder.layers.1.mlp.experts.experts.linear_fc2.weight"], down)
    assert ("self_attention.linear_qkv.weight", 1) in origins
    assert origins["self_attention.in_proj.weight", 0][0] == "carried"
    assert origins["self_attention.out_proj.weight", 0] == (
        "carried",
        "model.layers.*.self_attn.o_proj.weight",
    )
    gates = [name for name in parts if name in ("in_proj.a", "in_proj.b", "in_proj.g")]
    assert all(not parts[name].any() for name in gates)
    assert logits.isfinite().all() and logits.std() > 0.05
    if "conv_weight" in parts:
        assert torch.equal(parts["conv_weight"][..., :-1], torch.zeros_like(parts["conv_weight"][..., :-1]))


def test_memories_start_alike(gloo, tmp_path):
    ours, theirs, *_ = converted(gloo, tmp_path, "mom_gated_deltanet")
    memories = ours["decoder.layers.0.self_attention.memory_weight"]
    assert memories.shape[0] == 4 and all(torch.equal(memories[0], memory) for memory in memories)
    key = repeated(theirs["model.layers.0.self_attn.k_proj.weight"])
    assert torch.equal(memories[0, :, :16].flatten(0, 1), key)


def test_gates_of_memories_start_neutral(gloo, tmp_path):
    ours, *_ = converted(gloo, tmp_path, "mom_gla")
    ups = [value for name, value in ours.items() if name.endswith(("memory_a_up", "low_rank.a.up.weight"))]
    assert len(ups) == 2 and not any(up.any() for up in ups), (
        "of the memories, and of the one that they share"
    )


def every_mixer(rank, world, folder):
    """Each one imports and loads; which of them took over the output projection."""
    from linear_moe.checkpoint.importing import import_model
    from linear_moe.inference.load import load_model

    outputs = {}
    for mixer in lsm.names():
        run = Path(folder) / mixer
        narrow = {
            "hgrn2": ["--hgrn2-expand-ratio", "16"],
            "mom_hgrn2": ["--mom-hgrn2-expand-ratio", "16"],
            "mamba2": ["--mamba2-ssm-head-dim", "32", "--mamba2-state-size", "16"],
        }
        extra = narrow.get(mixer, [])
        done = import_model(Path(folder) / "hf", run, la_module=mixer, layer_type_list="L", extra_args=extra)
        model = load_model(run).model
        logits = whole_forward(model, some_tokens(1, 8))
        how = {o.pattern.split(".")[-2]: o.how for o in done.origins if "out_proj" in o.pattern}
        weights = (p for p in model.parameters() if p.ndim > 1)
        spread = max(weight.abs().max().item() for weight in weights)
        outputs[mixer] = logits.isfinite().all().item() and spread < 10, how["out_proj"]
    return outputs


def test_every_mixer_can_be_started(gloo, tmp_path):
    gloo(1, source_model, str(tmp_path / "hf"))
    outputs = gloo(1, every_mixer, str(tmp_path))[0]
    assert not [mixer for mixer, (sound, _) in outputs.items() if not sound]
    assert {mixer for mixer, (_, how) in outputs.items() if how != "carried"} == {"mamba2"}


FINAL = ("qwen3_next", "mamba2")
"""Models without anything that another mixer continues."""


def every_family(rank, world, folder):
    """The first of two layers becomes gated_deltanet; what its output projection started from."""
    from linear_moe.checkpoint.importing import import_model
    from linear_moe.inference.load import load_model

    found = {}
    for name in [name for name in MODELS if not name.startswith(FINAL)]:
        source, run = Path(folder) / name, Path(folder) / f"{name}-run"
        save_hf(source, name)
        done = import_model(source, run, la_module="gated_deltanet", layer_type_list="LN")
        hows = {o.pattern.split("self_attention.")[-1]: o.how for o in done.origins if o.layers == [0]}
        assert whole_forward(load_model(run).model, some_tokens(1, 8)).isfinite().all(), name
        found[name] = hows["in_proj.weight"], hows["out_proj.weight"]
    return found


def test_every_family_can_be_linearised(gloo, tmp_path):
    found = gloo(1, every_family, str(tmp_path))[0]
    for name, hows in found.items():
        assert hows == ("started" if name.startswith("deepseek") else "carried", "carried"), name


def with_other_mixers(rank, world, folder, name):
    from linear_moe.checkpoint.importing import import_model

    source, run = Path(folder) / "hf", Path(folder) / "run"
    save_hf(source, name)
    with pytest.raises(ValueError, match=f"{name.partition('-')[0]} cannot get other mixers"):
        import_model(source, run, la_module="gla", layer_type_list="LN")
    return run.exists()


@pytest.mark.parametrize("name", ["qwen3_next-equal", "mamba2"])
def test_no_mixer_continues_an_output_gate_or_another_mixer(gloo, tmp_path, name):
    assert gloo(1, with_other_mixers, str(tmp_path), name) == [False]


def test_options_of_the_user_win(gloo, tmp_path):
    ours, *_ = converted(gloo, tmp_path, "gla", extra_args=["--gla-expand-k", "0.5", "--la-gate-fn", "swish"])
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["architecture"]["mixer_options"]["gla"] == {"expand_k": 0.5, "output_gate": "swish"}
    assert ours["decoder.layers.0.self_attention.low_rank.a.up.weight"].shape == (4 * 8, 16)


def test_it_trains(gloo, tmp_path):
    converted(gloo, tmp_path, "gated_deltanet")
    run, out = tmp_path / "run", tmp_path / "out"
    saved = json.loads((run / "config.json").read_text())
    steps = [
        "--lr",
        "1e-3",
        "--train-iters",
        "3",
        "--eval-iters",
        "0",
        "--mock-data",
        "--lr-warmup-iters",
        "0",
    ]
    steps += ["--num-workers", "0", "--split", "99,1,0", "--no-create-attention-mask-in-dataloader"]
    steps += ["--seq-length", "32", "--global-batch-size", "2", "--eval-interval", "1000", "--seed", "5"]
    steps += ["--distributed-backend", "gloo", "--pretrained-checkpoint", str(run / "checkpoint")]
    gloo(1, train, [*saved["arguments"], *steps, "--run-dir", str(out), "--load", str(out / "checkpoint")])
    steps = metrics(out)
    assert len(steps) == 3 and all(step["lm_loss"] < 7 and step["grad_norm"] > 0 for step in steps)


def there_and_back(rank, world, folder):
    """A folder with our code: imported as it is, with one more layer replaced, and with a mixer replaced (refused)."""
    import transformers

    from linear_moe.checkpoint.exporting import export_model
    from linear_moe.checkpoint.hf_folder import stored_tensors
    from linear_moe.checkpoint.importing import import_model
    from linear_moe.inference.load import load_model

    folder = Path(folder)
    mixers = {"layer_type_list": "LN", "extra_args": ["--hgrn2-expand-ratio", "16"]}
    import_model(folder / "hf", folder / "run", la_module="hgrn2", **mixers)
    exported = export_model(folder / "run", folder / "ours")
    done = import_model(folder / "ours", folder / "again")
    assert not exported.is_native and {origin.how for origin in done.origins} == {"carried"}
    assert export_model(folder / "again", folder / "back").num_tensors == exported.num_tensors
    tensors = [{k: s.read(k) for k, s in stored_tensors(folder / p).items()} for p in ("ours", "back")]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[1][key], tensor) for key, tensor in tensors[0].items())
    logits = [whole_forward(load_model(folder / p).model, some_tokens()) for p in ("run", "again")]
    assert torch.equal(*logits)
    done = import_model(folder / "ours", folder / "more", la_module="hgrn2,gla", layer_type_list="12")
    hows = {(origin.pattern, *origin.layers): origin.how for origin in done.origins}
    prefix = "decoder.layers.*.self_attention."
    assert hows[prefix + "norm_weight", 1] == "started" and hows[prefix + "norm_weight", 0] == "carried"
    assert hows["hgrn2_tables.lower_bounds",] == "carried"
    assert whole_forward(load_model(folder / "more").model, some_tokens()).isfinite().all()
    refusals = []
    saved = transformers.AutoModelForCausalLM.from_pretrained(folder / "ours", trust_remote_code=True)
    saved.save_pretrained(folder / "saved")
    import_model(folder / "saved", folder / "from saved")
    again = transformers.AutoConfig.from_pretrained(folder / "saved", trust_remote_code=True)
    again.save_pretrained(folder / "saved")  # onto itself
    files = [(folder / p / "linear_moe_run.json").read_text() for p in ("ours", "saved")]
    assert files[0] == files[1]
    config = json.loads((folder / "saved" / "config.json").read_text())
    config["mixers"]["hgrn2"]["expand_ratio"], config["rms_norm_eps"] = 8, 0.1
    (folder / "saved" / "config.json").write_text(json.dumps(config))
    more = {"la_module": "hgrn2", "layer_type_list": "L"}
    for name, options in (("ours", {"la_module": "gla"}), ("saved", {}), ("ours", more)):
        try:
            import_model(folder / name, folder / "none", **options)
        except ValueError as error:
            refusals.append(str(error))
    assert not list(folder.glob("none*"))
    return refusals, [(folder / p / "config.json").read_text() for p in ("ours", "back")]


def test_our_own_folders_come_back(gloo, tmp_path):
    gloo(1, source_model, str(tmp_path / "hf"))
    refusals, configs = gloo(1, there_and_back, str(tmp_path))[0]
    assert "layer 0 of the model is hgrn2, not softmax" in refusals[0]
    assert (
        "has other values of mixers, rms_norm_eps in config.json than linear_moe_run.json makes"
        in refusals[1]
    )
    assert "cannot get more layers of hgrn2: those that it has would change (hgrn2_tables" in refusals[2]
    assert refusals[2].endswith("--layer-kinds hgrn2,gla")
    assert configs[0] == configs[1]


def another_first_layer(rank, world, folder):
    """Of a mixer whose later layers read the first, which has no tensors for that; and other options."""
    from linear_moe.checkpoint.exporting import export_model
    from linear_moe.checkpoint.importing import import_model

    save_hf(folder / "hf", "qwen2")
    import_model(folder / "hf", folder / "run", kinds=["softmax", "rwkv7"])
    export_model(folder / "run", folder / "ours")
    refused = r"more layers of rwkv7: .*layers.1.*low_rank.mix.*\n  why: .*\n  try: .*-kinds gla,rwkv7$"
    with pytest.raises(ValueError, match=refused):
        import_model(folder / "ours", folder / "none", kinds=["rwkv7", "rwkv7"])
    options, refused = (
        ["--rwkv7-conv-size", "3"],
        r"would change layers of .*ours that stay: conv_size of rwkv7\n  why: ",
    )
    with pytest.raises(ValueError, match=refused):
        import_model(folder / "ours", folder / "none", kinds=["gla", "rwkv7"], extra_args=options)
    return (folder / "none.part").exists()


def test_a_layer_that_another_one_would_change_is_told(gloo, tmp_path):
    assert gloo(1, another_first_layer, tmp_path) == [False]
