"""Runs of the family mamba2, whose layers have no feed-forward block: trained, resumed, decoded, exported, imported."""

import json
from pathlib import Path

import pytest
import torch

from linear_moe.launch import __main__ as launcher
from linear_moe.launch.hugging_face import import_command
from linear_moe.launch.megatron_args import training_arguments
from linear_moe.launch.preflight import preflight
from tests.checkpoint.hf_models import hf_logits, hf_model, on_cpu, save_hf, some_tokens
from tests.checkpoint.test_convert_launch import run_command
from tests.inference.models import whole_forward
from tests.launch.plans import message
from tests.launch.test_run_scripts import command
from tests.training.tiny import losses, metrics, train


def exported(rank, world, run, target, prompts):
    """Our logits and greedy text, and the class of transformers that the run becomes."""
    from linear_moe.checkpoint.exporting import export_model
    from linear_moe.inference.generate import generate
    from linear_moe.inference.load import load_model

    done = export_model(run, target)
    loaded = load_model(run)
    text = generate(loaded, prompts, max_new_tokens=32) if prompts else []
    return done.architecture, whole_forward(loaded.model, some_tokens()), text


def test_from_the_script_to_transformers(gloo, tmp_path):
    """Step 3 after a checkpoint of step 2 is step 3; the class of transformers says what our decoding says."""
    for folder, runs in (("whole", ["3"]), ("cut", ["2", "3"])):
        for iterations in runs:
            words = command(
                "mamba2", tmp_path / folder, TRAIN_ITERS=iterations, EXTRA_ARGS="--lr-decay-iters 3"
            )
            gloo(1, train, words)
    steps = metrics(tmp_path / "whole" / "run")
    assert all(6.5 < step["lm_loss"] < 7.5 and 0 < step["grad_norm"] < 100 for step in steps)
    assert losses(tmp_path / "cut" / "run") == [step["lm_loss"] for step in steps]
    other = {
        "RUN_NAME": "run",
        "OUTPUT_BASEPATH": str(tmp_path / "cut"),
        "EXTRA_ARGS": "--ffn-hidden-size 64",
    }
    assert "ffn_hidden_size: 0 -> 64" in message(family="mamba2", **other)
    keys = {key for key in gloo(1, keys_of, str(tmp_path / "cut" / "run"))[0] if ".layers.0." in key}
    assert keys and not [key for key in keys if "mlp" in key]
    prompts = some_tokens(2, 8)
    architecture, logits, text = gloo(1, exported, tmp_path / "cut" / "run", tmp_path / "hf", prompts)[0]
    assert architecture == "Mamba2ForCausalLM"
    theirs = hf_logits(tmp_path / "hf", some_tokens())
    torch.testing.assert_close(logits[..., : theirs.shape[-1]], theirs, rtol=0, atol=1e-5)
    with on_cpu():
        said = hf_model(tmp_path / "hf").generate(torch.tensor(prompts), max_new_tokens=32, do_sample=False)
    assert [list(tokens)[-32:] for tokens in text] == said[:, 8:].tolist()


def keys_of(rank, world, run):
    from linear_moe.checkpoint.blueprint import blueprint
    from linear_moe.training.run import read_config

    return list(blueprint(read_config(Path(run))["arguments"], padded_vocab_size=1024).tensors)


def test_from_a_folder_of_transformers_to_a_step(gloo, tmp_path):
    """The script needs the folder only: sizes, options of the mixer and the pattern are its own."""
    gloo(1, saved, str(tmp_path / "hf"))
    given = {"PRETRAIN_CHECKPOINT_PATH": str(tmp_path / "hf"), "OUTPUT_BASEPATH": str(tmp_path), "PR": "fp32"}
    given |= {
        "SEQ_LEN": "32",
        "TRAIN_ITERS": "2",
        "BATCH_SIZE": "1",
        "GLOBAL_BATCH_SIZE": "2",
        "RUN_NAME": "run",
    }
    plan = launcher._plan_pretraining(given, "mamba2", 0)
    preflight(plan)
    assert plan.kinds == ("mamba2",) * 2 and plan.size.ffn_hidden_size == 0 and plan.size.fp32_residual
    words = import_command(plan, tmp_path / "hf", plan.run_dir / "pretrained")
    assert gloo(1, run_command, words[2:]) == [0]
    gloo(1, train, [*training_arguments(plan), "--eval-iters", "0"])
    assert 4 < losses(plan.run_dir)[0] < 7
    with pytest.raises(ValueError, match="mamba2 cannot get other mixers"):
        launcher._plan_pretraining(given | {"LA_MODULE": "gla"}, "mamba2", 0)
    with pytest.raises(
        ValueError, match=r"is a mamba2 model.(.|\n)*sh examples/linear_mamba2/run_pretrain_mamba2"
    ):
        launcher._plan_pretraining(given, "qwen2", 0)


def saved(rank, world, folder):
    save_hf(folder, "mamba2")


def test_half_precision_keeps_the_stream(gloo, tmp_path):
    """In bf16 the residual stream is float32, as published; pipelines send it so, and the exported code keeps it so.

    The first value of rwkv7, which rides behind it from stage to stage, stays what the projections gave.
    """
    model = {
        "PR": "bf16",
        "LA_MODULE": "rwkv7,mamba2",
        "LAYER_TYPE_LIST": "12",
        "PP": "2",
        "GPUS_PER_NODE": "2",
    }
    words = command("mamba2", tmp_path, TRAIN_ITERS="2", SAVE_INTERVAL="0", **model)
    gloo(2, train, words)
    assert all(6.5 < loss < 7.5 for loss in losses(tmp_path / "run"))
    assert gloo(1, stream_dtypes, words)[0] == {"layer": "torch.float32", "logits": "torch.bfloat16"}


def stream_dtypes(rank, world, words):
    """Of what leaves a layer, and of the logits, of the model that a command line makes; in a worker."""
    from linear_moe.checkpoint.remote import hf_config
    from linear_moe.checkpoint.remote.model.modeling_linear_moe import LinearMoeConfig, LinearMoeForCausalLM
    from tests.inference.models import random_weights

    loaded = random_weights(words, torch.bfloat16)
    found = []
    config = hf_config(loaded.config, vocab_size=128, dtype="bfloat16")
    for model, layers in (
        (loaded.model, loaded.model.decoder.layers),
        ((theirs := LinearMoeForCausalLM(LinearMoeConfig(**config)).to(torch.bfloat16)), theirs.model.layers),
    ):
        seen = {}
        layers[0].register_forward_hook(lambda module, given, out, s=seen: s.update(layer=str(out[0].dtype)))
        tokens = torch.tensor([[1, 2, 3]])
        with torch.no_grad():
            out = (
                model(tokens, torch.arange(3)[None], None) if model is loaded.model else model(tokens).logits
            )
        found.append(seen | {"logits": str(out.dtype)})
    assert found[0] == found[1], found
    return found[0]


@pytest.mark.parametrize(
    "variables",
    [
        {"EXTRA_ARGS": "--num-layers 2 --mamba2-expand 1.5 --mamba2-ssm-head-dim 32"},
        {"EXTRA_ARGS": "--num-layers 2 --mamba2-norm-eps 1e-3"},
        {"EXTRA_ARGS": "--num-layers 2", "LA_MODULE": "gla", "LAYER_TYPE_LIST": "LN"},
        {"EXTRA_ARGS": "--num-layers 2 --num-experts 4 --moe-ffn-hidden-size 64"},
    ],
    ids=lambda variables: " ".join(variables.values()),
)
def test_other_layers_bring_their_code(gloo, tmp_path, variables, request):
    """What the class of transformers has no field for; without feed-forward blocks, too, but for experts."""
    gloo(1, train, command("mamba2", tmp_path, TRAIN_ITERS="1", **variables))
    target = (
        tmp_path / f"hf{hash(request.node.name) % 10**6}"
    )  # transformers tells code apart by the folder's name
    architecture, logits, _ = gloo(1, exported, tmp_path / "run", target, [])[0]
    assert architecture == "LinearMoeForCausalLM"
    theirs = hf_logits(target, some_tokens(), trust_remote_code=True)
    torch.testing.assert_close(logits[..., : theirs.shape[-1]], theirs, rtol=0, atol=1e-5)


def from_pickles(rank, world, folder):
    """Parts of one tensor, out of a pickle; in two dtypes on the way back where the source has two."""
    from linear_moe.checkpoint.exporting import export_model
    from linear_moe.checkpoint.hf_folder import stored_tensors
    from linear_moe.checkpoint.importing import import_model

    source = Path(folder) / "hf"
    save_hf(source, "mamba2")
    tensors = {name: stored.read(name) for name, stored in stored_tensors(source).items()}
    for path in source.glob("model*"):
        path.unlink()
    for name in [name for name in tensors if name.endswith(("A_log", "conv1d.weight"))]:
        tensors[name] = tensors[name].bfloat16()
    torch.save(tensors, source / "pytorch_model.bin")
    import_model(source, Path(folder) / "run", allow_pickle=True)
    export_model(Path(folder) / "run", Path(folder) / "back", shard_bytes=20_000)
    after = stored_tensors(Path(folder) / "back")
    assert after.keys() == tensors.keys()
    for name, tensor in tensors.items():
        found = after[name].read(name)
        assert found.dtype == tensor.dtype and torch.equal(found, tensor), name
    return len(tensors)


def test_parts_of_pickled_tensors(gloo, tmp_path):
    assert gloo(1, from_pickles, str(tmp_path))[0] == 21


def refused(rank, world, folder, change):
    from linear_moe.checkpoint.importing import import_model

    source = Path(folder) / "hf"
    save_hf(source, "mamba2")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError) as error:
        import_model(source, Path(folder) / "run")
    assert not (Path(folder) / "run").exists() and not (Path(folder) / "run.part").exists()
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"use_bias": True}, ["config.json has use_bias = True"]),
        (
            {"state_size": 8},
            [
                "wrong shape: backbone.layers.*.mixer.in_proj.weight expected [296, 64], found [328, 64]",
                "wrong shape: backbone.layers.*.mixer.conv1d.weight expected [160, 1, 4], found [192, 1, 4]",
            ],
        ),
    ],
)
def test_nothing_is_written(gloo, tmp_path, change, parts):
    """Whole tensors of theirs are reported, not the parts that are ours."""
    text = gloo(1, refused, str(tmp_path), change)[0]
    for part in [*parts, "\n  why: ", "\n  try: "]:
        assert part in text, text
    assert "[0]" not in text
