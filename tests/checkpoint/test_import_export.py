"""Hugging Face -> us -> Hugging Face: every tensor and the config as they were, and the same logits on the way."""

import json
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from tests.checkpoint.hf_models import MODELS, VOCAB, hf_logits, hf_model, on_cpu, save_hf, some_tokens
from tests.inference.models import argv, whole_forward
from tests.training.tiny import EXPERTS, losses, train, whole


def there_and_back(rank, world, folder, name, dtype):
    """Import, logits of ours, export; what must be equal is compared here."""
    from linear_moe.checkpoint.exporting import export_model
    from linear_moe.checkpoint.hf_folder import stored_tensors
    from linear_moe.checkpoint.importing import import_model
    from linear_moe.inference.load import load_model

    source, run, back = (Path(folder) / part for part in ("hf", "run", "back"))
    save_hf(source, name, dtype=dtype)
    import_model(source, run)
    exported = export_model(run, back, shard_bytes=50_000)
    before, after = stored_tensors(source), stored_tensors(back)
    assert before.keys() == after.keys()
    for key, stored in before.items():
        there, again = stored.read(key), after[key].read(key)
        assert there.dtype == again.dtype == dtype and torch.equal(there, again), key
    logits = whole_forward(load_model(run, dtype=torch.float32).model, some_tokens())[..., :VOCAB]
    return logits, exported.architecture, exported.is_native


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(gloo, tmp_path, name):
    logits, architecture, is_native = gloo(1, there_and_back, str(tmp_path), name, torch.float32)[0]
    assert is_native and architecture == MODELS[name][0] + "ForCausalLM"
    theirs = hf_logits(tmp_path / "hf", some_tokens())
    assert theirs.std() > 0.05
    torch.testing.assert_close(logits, theirs, rtol=0, atol=1e-5)
    configs = [json.loads((tmp_path / part / "config.json").read_text()) for part in ("hf", "back")]
    assert configs[0] == configs[1]


def test_the_index_says_where_tensors_are(gloo, tmp_path):
    """By another reader: every tensor once, in the file that the index names, and their bytes."""
    from safetensors import safe_open

    gloo(1, there_and_back, str(tmp_path), "qwen2-tied", torch.bfloat16)
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    found, size = {}, 0
    for path in sorted((tmp_path / "back").glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            for name in file.keys():  # noqa: SIM118
                assert name not in found
                found[name] = path.name
                size += file.get_tensor(name).nbytes
    assert len(set(found.values())) > 2 and found == index["weight_map"]
    assert index["metadata"] == {"total_size": size}


def with_more_tokens_predicted(rank, world, folder):
    """Published Qwen3-Next has layers that transformers does not read."""
    from safetensors.torch import save_file

    from linear_moe.checkpoint.importing import import_model

    source = Path(folder) / "hf"
    save_hf(source, "qwen3_next-equal")
    before = import_model(source, Path(folder) / "before").warnings
    save_file({"mtp.fc.weight": torch.zeros(2, 2)}, source / "mtp.safetensors")
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"]["mtp.fc.weight"] = "mtp.safetensors"
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    return before, import_model(source, Path(folder) / "run").warnings


def test_multi_token_prediction_is_left_out(gloo, tmp_path):
    before, warnings = gloo(1, with_more_tokens_predicted, str(tmp_path))[0]
    assert set(warnings) - set(before) == {"1 tensors of multi-token prediction (mtp) are left out"}
    assert not any("mtp" in warning for warning in before)


def greedy(rank, world, folder, prompts):
    from linear_moe.checkpoint.importing import import_model
    from linear_moe.inference.generate import generate
    from linear_moe.inference.load import load_model

    import_model(Path(folder) / "hf", Path(folder) / "run")
    return generate(load_model(Path(folder) / "run"), prompts, max_new_tokens=64)


def save(rank, world, folder, name):
    save_hf(folder, name)


@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_next", "deepseek_v2", "mamba2"])
def test_greedy_text_is_the_same(gloo, tmp_path, name):
    gloo(1, save, str(tmp_path / "hf"), name)
    prompts = some_tokens(2, 8)
    with on_cpu():
        model = hf_model(tmp_path / "hf")
        theirs = model.generate(torch.tensor(prompts), max_new_tokens=64, do_sample=False, eos_token_id=None)
    ours = gloo(1, greedy, str(tmp_path), prompts)[0]
    assert [list(tokens)[-64:] for tokens in ours] == theirs[:, 8:].tolist()


def exported_from_arguments(rank, world, folder):
    """The same without the config of the source: what a model of our own training would become."""
    from linear_moe.checkpoint.exporting import export_model

    return export_model(Path(folder) / "run" / "checkpoint", Path(folder) / "own").architecture


@pytest.mark.parametrize("name", MODELS)
def test_native_config_from_our_arguments(gloo, tmp_path, name):
    gloo(1, there_and_back, str(tmp_path), name, torch.bfloat16)
    (tmp_path / "run" / "hugging_face" / "config.json").unlink()
    architecture = gloo(1, exported_from_arguments, str(tmp_path))[0]
    assert architecture == MODELS[name][0] + "ForCausalLM"
    ours, theirs = (json.loads((tmp_path / part / "config.json").read_text()) for part in ("own", "hf"))
    assert ours["dtype"] == "bfloat16"
    import transformers

    loaded = transformers.AutoConfig.from_pretrained(tmp_path / "own")
    tokens = ["bos_token_id", "eos_token_id", "pad_token_id"]  # nothing ends a text without a tokenizer
    assert [getattr(loaded, token) for token in tokens] == [None] * 3
    same = set(ours) - {"head_dim", *tokens}
    assert {key: ours[key] for key in same} == {key: theirs.get(key, ours[key]) for key in same}
    logits = hf_logits(tmp_path / "own", some_tokens())
    torch.testing.assert_close(logits, hf_logits(tmp_path / "hf", some_tokens()), rtol=0, atol=1e-6)


def trained_on_otherwise(rank, world, folder):
    """Exports of a run that was imported, once as it is, and with a rotary part that a training has set there."""
    from linear_moe.checkpoint.exporting import export_model
    from linear_moe.checkpoint.importing import import_model

    save_hf(folder / "hf", "qwen2")
    import_model(folder / "hf", folder / "run")
    config = json.loads((folder / "run" / "config.json").read_text())
    found = [export_model(folder / "run", folder / "same").architecture]
    more = {**config, "arguments": [*config["arguments"], "--rotary-percent", "0.5"]}
    (folder / "run" / "config.json").write_text(json.dumps(more))
    found.append(export_model(folder / "run", folder / "other").architecture)
    half = {**config, "arguments": [*config["arguments"], "--bf16"], "params_dtype": "bfloat16"}
    (folder / "run" / "config.json").write_text(json.dumps(half))
    found.append(export_model(folder / "run", folder / "half").architecture)
    found.append(json.loads((folder / "half" / "config.json").read_text())["dtype"])
    (folder / "run" / "hugging_face" / "config.json").write_text('{"vocab_size": 250}')
    found.append(export_model(folder / "run", folder / "typeless").architecture)
    (folder / "run" / "hugging_face" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"hugging_face/config.json cannot be read: .*\n  why: "):
        export_model(folder / "run", folder / "cut")
    (folder / "run" / "hugging_face" / "config.json").write_text("{}")
    more["arguments"] = [*config["arguments"], "--use-mup", "--mup-base-hidden-size", "16"]
    (folder / "run" / "config.json").write_text(json.dumps(more))
    try:
        return [*found, export_model(folder / "run", folder / "scaled").architecture]
    except ValueError as error:
        return [*found, str(error).splitlines()[0]]


def test_the_config_of_the_source_is_given_back_only_where_it_is_true(gloo, tmp_path):
    refused = "the model cannot be exported with use_mup=True"
    found = gloo(1, trained_on_otherwise, tmp_path)[0]
    theirs, ours = "Qwen2ForCausalLM", "LinearMoeForCausalLM"
    assert found == [theirs, ours, theirs, "bfloat16", theirs, refused]


def imported(rank, world, source, run, options):
    from linear_moe.checkpoint.importing import import_model

    save_hf(source, options.pop("model"))
    import_model(source, run, **options)


def test_every_layout_opens_an_import(gloo, tmp_path):
    """Training from it under TP2 and EP2: the weights that each rank has are those of the file."""
    run, out = tmp_path / "run", tmp_path / "out"
    gloo(1, imported, str(tmp_path / "hf"), str(run), {"model": "qwen2_moe"})
    saved = json.loads((run / "config.json").read_text())
    layout = ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--expert-model-parallel-size", "2"]
    layout += ["--expert-tensor-parallel-size", "1", "--seq-length", "32", "--global-batch-size", "2"]
    steps = ["--lr", "0", "--min-lr", "0", "--train-iters", "1", "--eval-iters", "0", "--mock-data"]
    steps += [
        "--lr-warmup-iters",
        "0",
        "--num-workers",
        "0",
        "--split",
        "99,1,0",
        "--distributed-backend",
        "gloo",
    ]
    steps += ["--no-create-attention-mask-in-dataloader", "--eval-interval", "1000"]
    steps += ["--run-dir", str(out), "--pretrained-checkpoint", str(run / "checkpoint")]
    steps += ["--load", str(out / "checkpoint")]
    ranks = gloo(2, train, [*saved["arguments"], *layout, *steps], True)
    held = whole([seen["after"] for seen in ranks])
    there = gloo(1, checkpoint_tensors, str(run / "checkpoint" / "iter_0000001"))[0]
    assert held.keys() == there.keys()
    for key, weight in there.items():
        assert torch.equal(held[key], weight), key
    version, step = gloo(1, common_state, str(run / "checkpoint" / "iter_0000001"))[0]
    assert (version, step) == (3.0, 1), "Megatron rearranges weights of older versions"
    assert 4 < losses(out)[0] < 7


def common_state(rank, world, folder):
    from megatron.core.dist_checkpointing import load_common_state_dict

    state = load_common_state_dict(folder)
    return state["checkpoint_version"], state["iteration"]


def checkpoint_tensors(rank, world, folder):
    from linear_moe.checkpoint.torch_dist import Reader

    reader = Reader(Path(folder))
    return {key: reader.read(key) for key in reader.tensors}


def saved_under_a_layout(folder):
    layout = ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--expert-model-parallel-size", "2"]
    folders = ["--run-dir", str(folder), "--save", str(folder / "checkpoint"), "--train-iters", "1"]
    return argv(["gated_deltanet", "softmax", "rwkv7", "mamba2"], *folders, "--lr-warmup-iters", "0", *layout)


def test_every_layout_is_exported(gloo, tmp_path):
    """A checkpoint of two ranks with TP and EP: what is read is what the ranks held; the folder computes the same."""
    run = tmp_path / "run"
    held = whole([seen["after"] for seen in gloo(2, train, saved_under_a_layout(run), True)])
    there = gloo(1, checkpoint_tensors, str(run / "checkpoint" / "iter_0000001"))[0]
    for key, weight in held.items():
        assert torch.equal(there[key], weight), key
    logits, architecture = gloo(1, exported, str(run), str(tmp_path / "hf"))[0]
    assert architecture == "LinearMoeForCausalLM"
    tokens = [[token % 127 for token in row] for row in some_tokens()]
    theirs = hf_logits(tmp_path / "hf", tokens, trust_remote_code=True)
    torch.testing.assert_close(logits, theirs, rtol=0, atol=1e-5)


def exported(rank, world, run, target):
    from linear_moe.checkpoint import torch_dist
    from linear_moe.checkpoint.exporting import export_model
    from linear_moe.inference.load import load_model

    tokens = [[token % 127 for token in row] for row in some_tokens()]
    pieces: list[tuple[str, tuple[int, ...]]] = []
    read = torch_dist.Reader._read_piece

    def counted(self, key, chunk):
        pieces.append((key, tuple(chunk.offsets)))
        return read(self, key, chunk)

    with patch.object(torch_dist.Reader, "_read_piece", counted):
        architecture = export_model(run, target).architecture
    assert len(pieces) == len(set(pieces)), "a piece with several experts was read for each of them"
    return whole_forward(load_model(run).model, tokens), architecture


ONE_OF_SIGMOIDS = [flag for flag in EXPERTS if flag != "--moe-router-pre-softmax"]
ONE_OF_SIGMOIDS += ["--moe-router-score-function", "sigmoid", "--moe-router-topk", "1"]
ONE_OF_SIGMOIDS += ["--moe-shared-expert-intermediate-size", "40", "--moe-shared-expert-gate"]
"""Experts like Qwen2's, with a router that Megatron does not build as Qwen2's: a softmax over one."""


@pytest.mark.parametrize(
    ("flags", "architecture"),
    [
        ([], "Qwen2ForCausalLM"),
        (ONE_OF_SIGMOIDS, "LinearMoeForCausalLM"),
        (["--qk-layernorm"], "LinearMoeForCausalLM"),
        (["--rotary-percent", "0.5"], "LinearMoeForCausalLM"),
    ],
)
def test_a_class_of_transformers_only_where_it_computes_the_same(gloo, tmp_path, flags, architecture):
    run = tmp_path / "run"
    folders = ["--run-dir", str(run), "--save", str(run / "checkpoint"), "--train-iters", "1"]
    gloo(1, train, argv(["softmax"] * 2, *folders, "--lr-warmup-iters", "0", *flags, moe=False))
    logits, found = gloo(1, exported, str(run), str(tmp_path / "hf"))[0]
    assert found == architecture
    tokens = [[token % 127 for token in row] for row in some_tokens()]
    theirs = hf_logits(tmp_path / "hf", tokens, trust_remote_code=True)
    torch.testing.assert_close(logits, theirs, rtol=0, atol=1e-5)


def with_a_tokenizer(rank, world, folder):
    """The tokenizer comes along both ways, and stays with a run that moves."""
    from linear_moe.checkpoint.exporting import export_model
    from linear_moe.checkpoint.importing import import_model
    from linear_moe.data.tokenizer import train_tokenizer
    from linear_moe.inference.load import load_model

    folder = Path(folder)
    save_hf(folder / "hf", "qwen2", vocab_size=300)
    train_tokenizer(["import os\n" * 9], 270, str(folder / "hf"))
    done = import_model(folder / "hf", folder / "run")
    (folder / "run").rename(folder / "moved")
    loaded = load_model(folder / "moved")
    assert loaded.tokenizer.detokenize(loaded.tokenizer.tokenize("import os")) == "import os"
    back = export_model(folder / "moved", folder / "back")
    assert done.warnings == back.warnings == []
    files = [(folder / part / "tokenizer.json").read_bytes() for part in ("hf", "moved/tokenizer", "back")]
    assert files[0] == files[1] == files[2]
    return sorted(path.name for path in (folder / "back").iterdir()), loaded.tokenizer.eod


def test_tokenizers_come_along(gloo, tmp_path):
    import transformers

    names, eod = gloo(1, with_a_tokenizer, str(tmp_path))[0]
    expected = [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert names == expected
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "back").eos_token_id == eod


def with_rows_that_win(rank, world, folder, tied):
    """A run of our own whose padding would win against every token; export with and without a class of theirs."""
    import transformers

    from linear_moe.checkpoint.exporting import export_model
    from linear_moe.checkpoint.importing import import_model
    from linear_moe.data.tokenizer import train_tokenizer

    folder = Path(folder)
    save_hf(folder / "hf", "qwen2-tied" if tied else "qwen2", vocab_size=384)
    tokens = train_tokenizer(["import os\n" * 9], 270, str(folder / "hf")).vocab_size
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf")
    head = model.get_output_embeddings().weight.data
    head[-2], head[-1] = head[0] * 1000, head[0] * -1000
    model.save_pretrained(folder / "hf", max_shard_size="60KB")  # the files that are there
    import_model(folder / "hf", folder / "run")
    (folder / "run" / "hugging_face" / "config.json").unlink()
    found = []
    for target, native in (("native", True), ("code", False)):
        export_model(folder / "run", folder / target, native=native)
        config = json.loads((folder / target / "config.json").read_text())
        found.append((config["vocab_size"], config["architectures"][0]))
    return tokens, found


@pytest.mark.parametrize("tied", [False, True])
def test_padding_of_the_vocabulary_is_not_generated(gloo, tmp_path, tied):
    import transformers

    tokens, found = gloo(1, with_rows_that_win, str(tmp_path), tied)[0]
    assert found == [(tokens, "Qwen2ForCausalLM"), (tokens, "LinearMoeForCausalLM")]
    prompt, answers = torch.tensor(some_tokens(2, 8)), []
    for folder in ("hf", "native", "code"):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / folder, dtype=torch.float32, trust_remote_code=True
        )
        with on_cpu():
            answers.append(
                model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None)[:, 8:]
            )
    assert (answers[0] >= tokens).any(), "the padding should win where it is there"
    assert (answers[1] < tokens).all() and torch.equal(answers[1], answers[2])
