"""A run read back from its folder alone: from every layout, at any step, and with one clear error where that cannot be.

The weights are compared with those that the training ranks held when they saved, put together by hand.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.inference.models import argv, files, prompts
from tests.training.tiny import DISTRIBUTED_OPTIMIZER, pieces, train, whole

KINDS = ["gated_deltanet", "gla", "linear_attention", "softmax"]
LAYOUTS = {
    "tp2-ep2": (
        2,
        ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--expert-model-parallel-size", "2"],
    ),
    "pp2-vpp2": (2, ["--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2"]),
    "dp2": (
        2,
        [*DISTRIBUTED_OPTIMIZER, "--recompute-granularity", "selective", "--calculate-per-token-loss"],
    ),
}


def saving(run: Path, *extra: str) -> list[str]:
    """One step and its checkpoint."""
    folders = ["--run-dir", str(run), "--save", str(run / "checkpoint")]
    return argv(KINDS, *folders, "--train-iters", "1", "--lr-warmup-iters", "0", *extra)


@pytest.fixture(scope="module")
def run(tmp_path_factory, _pool):
    """A run of one process with the checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("run") / "tiny"
    load = ["--load", str(folder / "checkpoint"), "--save-interval", "1", "--train-iters", "2"]
    _pool.run(1, train, saving(folder, *load))
    return folder


def loaded_weights(rank, world, run, options):
    from linear_moe.inference.load import load_model

    loaded = load_model(run, **options)
    dtypes = {str(parameter.dtype) for parameter in loaded.model.parameters()}
    assert not loaded.model.training
    return pieces(loaded.model, 0), loaded.iteration, dtypes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_process_reads_every_layout(gloo, tmp_path, layout):
    world, flags = LAYOUTS[layout]
    run = tmp_path / "run"
    held = whole([seen["after"] for seen in gloo(world, train, saving(run, *flags), True)])
    before = files(run)
    weights, iteration, _ = gloo(1, loaded_weights, run, {})[0]
    weights = whole([weights])
    assert iteration == 1
    assert weights.keys() == held.keys()
    for key, weight in weights.items():
        assert torch.equal(weight, held[key]), key
    assert files(run) == before, "something was written into the run"


def test_steps_and_dtypes(gloo, run):
    last, iteration, dtypes = gloo(1, loaded_weights, run, {})[0]
    assert iteration == 2 and dtypes == {"torch.float32"}
    first, iteration, _ = gloo(1, loaded_weights, run, {"step": 1})[0]
    assert iteration == 1
    last, first = whole([last]), whole([first])
    assert not torch.equal(
        first["embedding.word_embeddings.weight"], last["embedding.word_embeddings.weight"]
    )
    half, _, dtypes = gloo(1, loaded_weights, run, {"dtype": torch.bfloat16})[0]
    assert dtypes == {"torch.bfloat16", "torch.float32"}
    kept = {key for key, _, _, weight in half if weight.dtype == torch.float32}
    assert kept == {key for key in last if key.endswith(("A_log", "dt_bias"))} != set()
    for key, weight in whole([half]).items():
        assert torch.equal(weight, last[key] if key in kept else last[key].bfloat16().float()), key


def continuation(rank, world, run):
    from linear_moe.inference.generate import generate
    from linear_moe.inference.load import load_model

    return generate(load_model(run), prompts(1, 9), max_new_tokens=8)[0]


def trained_then_loaded(rank, world, run, extra):
    train(rank, world, saving(run, *extra))
    return continuation(rank, world, run)


def test_loading_where_training_just_ran(gloo, tmp_path):
    """Megatron's state of the training is still there; a fresh worker gives the same text."""
    run = tmp_path / "run"
    text = gloo(1, trained_then_loaded, run, ())[0]
    assert len(text) == 8
    assert gloo(1, continuation, run)[0] == text


def test_every_weight_goes_to_the_device(monkeypatch):
    """Megatron makes the gate of shared experts on the CPU, and only its own training moves it."""
    from linear_moe.inference.load import for_inference

    moved = []
    monkeypatch.setattr(torch.Tensor, "cuda", lambda x, *device: moved.append(tuple(x.shape)) or x)
    model = for_inference(torch.nn.Linear(2, 3), torch.bfloat16)
    assert sorted(moved) == [(3,), (3, 2)]
    assert all(x.dtype == torch.bfloat16 and not x.requires_grad for x in model.parameters())


def test_vocabulary_padded_for_another_layout(gloo, tmp_path):
    """Megatron pads 127 tokens to 256 rows for TP2 and to 128 for one process; config.json says what they were."""
    run = tmp_path / "run"
    flags = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
    padded = [word for word in saving(run, *flags) if word not in ("--padded-vocab-size", "128")]
    gloo(2, train, padded)
    assert json.loads((run / "config.json").read_text())["architecture"]["padded_vocab_size"] == 256
    assert len(gloo(1, continuation, run)[0]) == 8


def failure(rank, world, run, options):
    from linear_moe.inference.load import load_model

    try:
        load_model(run, **options)
    except ValueError as error:
        return str(error)
    return "no error"


def refused(gloo, run, *parts, world=1, **options):
    text = gloo(world, failure, run, options)[0]
    for part in (*parts, "\n  why: ", "\n  try: "):
        assert part in text, text


def test_what_is_no_run(gloo, tmp_path, run):
    refused(gloo, tmp_path, "is not a run")
    refused(gloo, tmp_path / "nowhere", "is not a run")
    refused(gloo, tmp_path / "checkpoint", "is not a run")
    refused(gloo, run / "checkpoint" / "iter_0000001", "is step 1, and step 2", step=2)
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "config.json").write_text((run / "config.json").read_text()[:100])
    refused(gloo, cut, "config.json cannot be read")
    (cut / "config.json").write_text('{"model_type": "qwen2"}')
    refused(gloo, cut, "Hugging Face", "tools/convert.py import", step=1)


def test_steps_that_are_not_there(gloo, tmp_path, run):
    refused(gloo, run, "no checkpoint of step 7", "are 1, 2", "--step 2", step=7)
    bare = tmp_path / "bare"
    shutil.copytree(run, bare)
    (bare / "checkpoint" / "latest_checkpointed_iteration.txt").unlink()
    refused(gloo, bare, "has no checkpoint", "--step 2")
    shutil.rmtree(bare / "checkpoint")
    refused(gloo, bare, "has no checkpoint")


@pytest.mark.parametrize("damage", [".metadata", "metadata.json", "__0_0.distcp", "cut"])
def test_damaged_checkpoints(gloo, tmp_path, run, damage):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    step = copy / "checkpoint" / "iter_0000002"
    if damage == "cut":
        data = step / "__0_0.distcp"
        data.write_bytes(
            data.read_bytes()[: data.stat().st_size // 10]
        )  # weights come before optimizer states
    else:
        (step / damage).unlink()
    refused(gloo, copy, "iter_0000002 cannot be loaded", "--step 1")


def test_a_config_of_another_model(gloo, tmp_path, run):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    config = json.loads((copy / "config.json").read_text())
    place = config["arguments"].index("--layer-kinds") + 1
    original = config["arguments"][place]

    def change(place, word):
        config["arguments"][place] = word
        (copy / "config.json").write_text(json.dumps(config))

    change(place, "gated_deltanet,gla,softmax,softmax")
    refused(gloo, copy, "is of another model", "decoder.layers.2.self_attention")
    change(place, original)
    change(config["arguments"].index("--add-qkv-bias"), "--no-rope-fusion")
    refused(gloo, copy, "is of another model", "it lacks nothing", "_bias")
    change(config["arguments"].index("--no-rope-fusion"), "--add-qkv-bias")
    change(config["arguments"].index("--hidden-size") + 1, "128")
    refused(gloo, copy, "iter_0000002 cannot be loaded")
    change(config["arguments"].index("--hidden-size"), "--hiden-size")
    refused(gloo, copy, "--hiden-size")


@pytest.mark.parametrize("inside", ["checkpoint", "checkpoint/iter_0000001"])
def test_a_folder_inside_a_run(gloo, run, inside):
    weights, iteration, _ = gloo(1, loaded_weights, run / inside, {})[0]
    assert iteration == (1 if "iter" in inside else 2)
    steps = whole([gloo(1, loaded_weights, run, {"step": iteration})[0][0]])
    assert all(torch.equal(weight, steps[key]) for key, weight in whole([weights]).items())


def ours_and_theirs(rank, world, folder):
    """Greedy continuations of a folder of Hugging Face's: by us, and by transformers, left-padded."""
    import transformers

    from linear_moe.inference.generate import generate
    from linear_moe.inference.load import load_model
    from tests.checkpoint.hf_models import save_hf

    save_hf(folder, "qwen2_moe")
    text, pad = [row[:length] for row, length in zip(prompts(3, 9), (9, 2, 5), strict=True)], 0
    ours = generate(load_model(folder), text, max_new_tokens=12)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.tensor([[pad] * (9 - len(row)) + row for row in text])
    mask = torch.tensor([[0] * (9 - len(row)) + [1] * len(row) for row in text])
    options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": pad}
    theirs = model.generate(tokens, attention_mask=mask, **options)[:, 9:].tolist()
    return ours, theirs


def test_a_folder_of_hugging_face(gloo, tmp_path):
    ours, theirs = gloo(1, ours_and_theirs, tmp_path)[0]
    assert ours == theirs
    refused(gloo, tmp_path, "Hugging Face", "tools/convert.py import", world=2)


MIXED = ["rwkv7", "mamba2", "mom_gla", "hgrn2", "rwkv7", "retention", "softmax"]


def ragged_continuation(rank, world, run):
    from linear_moe.inference.generate import generate
    from linear_moe.inference.load import load_model

    loaded = load_model(run, dtype=torch.float64)
    text = [row[:length] for row, length in zip(prompts(3, 9), (9, 2, 5), strict=True)]
    greedy = generate(loaded, text, max_new_tokens=12)
    return greedy, generate(loaded, text, max_new_tokens=12, temperature=2.0, top_p=0.95, seed=3)


def test_processes_share_a_model_by_tensor_parallelism(gloo, tmp_path):
    run = tmp_path / "run"
    layers = ["--num-layers", str(len(MIXED)), "--layer-kinds", ",".join(MIXED), "--lr", "1e-2"]
    gloo(1, train, saving(run, *layers, "--moe-router-dtype", "fp64", "--min-lr", "1e-2"))
    alone = gloo(1, ragged_continuation, run)[0]
    assert gloo(2, ragged_continuation, run) == [alone, alone]
    assert len({token for row in alone[1] for token in row}) > 8
    refused(gloo, run, "3 processes cannot share 4 attention heads", world=3)


def limits(rank, world):
    from types import SimpleNamespace

    from linear_moe.inference.load import _sequence_limit

    def limit(kind, wanted):
        config = SimpleNamespace(seq_length=128, position_embedding_type=kind)
        try:
            return _sequence_limit(config, wanted)
        except ValueError as error:
            return str(error)

    return [limit(kind, wanted) for kind in ("rope", "learned_absolute") for wanted in (None, 9, 128, 129)]


def test_only_learned_positions_end(gloo):
    *found, refused = gloo(1, limits)[0]
    assert found == [None, 9, 128, 129, 128, 9, 128]
    assert refused.startswith("max_sequence_length is 129, the model has 128 positions\n  why: ")
    assert refused.endswith("\n  try: max_sequence_length=128")


def join(rank, world):
    from megatron.core import parallel_state

    from linear_moe.inference import load

    told = []
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=world)
    for joined in (load.join_single_process, load.join_tensor_parallel):
        try:
            joined()
        except ValueError as error:
            told.append(str(error))
    return told


def test_processes_that_cannot_share_a_model(gloo):
    """A whole model has one process; those of another layout than tensor parallelism hold other layers."""
    single, tensor = gloo(2, join)[0]
    assert single.startswith("a whole model is held by one process, and there are 2\n  why: ")
    assert tensor.startswith("2 processes are there, and Megatron divides layers over 1 of them\n  why: ")
    assert gloo(1, join) == [[]]


def test_a_tokenizer_that_is_gone_is_told(gloo, tmp_path, run):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    config = json.loads((copy / "config.json").read_text())
    config["tokenizer"]["tokenizer_model"] = str(tmp_path / "gone")
    words = config["arguments"]
    place = words.index("--tokenizer-type") + 1
    words[place : place + 1] = ["HuggingFaceTokenizer", "--tokenizer-model", str(tmp_path / "gone")]
    (copy / "config.json").write_text(json.dumps(config))
    refused(gloo, copy, f"the tokenizer of {copy} cannot be opened: HuggingFaceTokenizer {tmp_path}/gone")
