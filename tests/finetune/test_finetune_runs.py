"""A tiny model learns toy instructions and stops by itself; a run in two parts is the run in one; validation."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from linear_moe.data.instructions.packing import Schedule, pack
from tests.finetune.chat import CAPITALS, chat_tokenizer, mixed_messages, prepared, toy_messages, write_lines
from tests.finetune.runs import arguments
from tests.training.test_resume import assert_equal_checkpoints
from tests.training.tiny import DISTRIBUTED_OPTIMIZER, losses, records, train

LEARN = [
    *("--train-iters", "60", "--lr", "1e-2", "--min-lr", "1e-3", "--lr-warmup-iters", "2"),
    *("--weight-decay", "0.01", "--global-batch-size", "8", "--micro-batch-size", "8"),
]


def answers(rank: int, world: int, run: Path) -> dict[str, str]:
    """What the model says to each country, in a chat, of at most 12 tokens: until it stops by itself."""
    from linear_moe.inference.chat import ChatTemplate
    from linear_moe.inference.generate import generate
    from linear_moe.inference.load import load_model

    loaded = load_model(run)
    chat = ChatTemplate(loaded.tokenizer)
    said = {}
    for country in CAPITALS:
        prompt = chat.prompt([{"role": "user", "content": country}])
        (output,) = generate(loaded, [prompt], max_new_tokens=12, eos=loaded.tokenizer.eod)
        said[country] = loaded.tokenizer.detokenize(output)
    return said


def exported_answers(rank: int, world: int, run: Path, folder: Path) -> dict[str, str]:
    """The same from the exported folder, by transformers alone, all at once with left padding."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from linear_moe.checkpoint.exporting import export_model

    export_model(run, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    questions = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": c}], tokenize=False, add_generation_prompt=True
        )
        for c in CAPITALS
    ]
    inputs = tokenizer(questions, return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    new = output[:, inputs["input_ids"].shape[1] :]
    assert all((row == tokenizer.eos_token_id).any() for row in new), "every answer has its end"
    return dict(zip(CAPITALS, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True))


def test_toy_instructions_are_learned(gloo, tmp_path):
    """Every answer, to the token that ends it; from the run and from the exported folder."""
    tokenizer = chat_tokenizer(tmp_path / "tokenizer")
    samples = prepared(tokenizer, write_lines(tmp_path / "toy.jsonl", toy_messages()), tmp_path / "cache")
    run = tmp_path / "run"
    argv = arguments(
        run, samples, tokenizer, "gated_deltanet,softmax", *LEARN, "--save", str(run / "checkpoint")
    )
    gloo(1, train, argv)
    assert gloo(1, answers, run) == [CAPITALS]
    assert gloo(1, exported_answers, run, tmp_path / "exported") == [CAPITALS]


def test_a_run_in_two_parts_is_the_run_in_one(gloo, tmp_path):
    """Bit for bit, over the border of two epochs; and with one process more, to rounding."""
    tokenizer = chat_tokenizer(tmp_path / "tokenizer")
    lines = write_lines(tmp_path / "mixed.jsonl", mixed_messages(40))
    samples = prepared(tokenizer, lines, tmp_path / "cache", 64)
    same = ["--global-batch-size", "4", "--train-iters", "8", "--save-interval", "5", "--lr", "1e-3"]

    def go(name: str, world: int, *extra: str) -> Path:
        run = tmp_path / name
        folder = str(run / "checkpoint")
        kinds = "gated_deltanet,softmax"
        options = [*same, "--save", folder, "--load", folder, *DISTRIBUTED_OPTIMIZER, *extra]
        gloo(world, train, arguments(run, samples, tokenizer, kinds, *options, moe=True))
        return run

    whole = go("whole", 1)
    steps = Schedule(len(pack(samples.lengths, 64, 1234)), 4, 1234).steps_per_epoch
    assert 3 <= steps < 6, "the parts meet in the second epoch"
    go("parts", 1, "--exit-interval", "5")
    parts = go("parts", 1)
    assert losses(parts) == losses(whole) and len(set(losses(whole))) == 8
    gloo(1, assert_equal_checkpoints, *(run / "checkpoint" / "iter_0000008" for run in (whole, parts)))
    (parts / "checkpoint" / "latest_checkpointed_iteration.txt").write_text("5")
    assert losses(go("parts", 2)) == pytest.approx(losses(whole), rel=1e-5)


def answers_alone(rank: int, world: int, run: Path, folder: Path) -> float:
    """Mean loss of all learned tokens, one sample after the other, by the path that evaluations of text take."""
    from linear_moe.data.instructions.prepare import open_prepared
    from linear_moe.inference.load import load_model
    from linear_moe.inference.score import score

    # Training knows no rows of padding in the vocabulary: all of them share the probability.
    loaded, samples, found = replace(load_model(run), vocab_size=384), open_prepared(folder), []
    for i in range(samples.report.samples):
        tokens, learned = samples.sample(i).tokens.tolist(), samples.sample(i).learned[1:]
        (result,) = score(loaded, [(tokens[:1], tokens[1:])])
        found += [-x for x, is_learned in zip(result.log_likelihoods, learned, strict=True) if is_learned]
    assert len(found) == samples.report.learned_tokens
    return sum(found) / len(found)


def test_an_evaluation_is_the_mean_over_all_answers(gloo, tmp_path):
    """Every time, whatever share of them each rank and batch has; of the training set here, at a rate of 0."""
    tokenizer = chat_tokenizer(tmp_path / "tokenizer")
    samples = prepared(
        tokenizer, write_lines(tmp_path / "mixed.jsonl", mixed_messages(9)), tmp_path / "cache", 128
    )
    packs = len(pack(samples.lengths, 128, 1234))
    assert 4 < packs < 8, "one batch of all, or three, of which the last is not full"
    options = ["--valid-instruction-data", str(samples.folder), "--eval-interval", "2"]
    options += ["--train-iters", "3", "--lr", "0", "--min-lr", "0", "--lr-warmup-iters", "0"]
    options += ["--seq-length", "128", "--max-position-embeddings", "128"]
    found = []
    for batch, batches in ((8, 1), (2, -(-packs // 2))):
        run = tmp_path / str(batch)
        size = ["--global-batch-size", str(batch), "--eval-iters", str(batches)]
        save = ["--save", str(run / "checkpoint")]
        gloo(2, train, arguments(run, samples, tokenizer, "gla,softmax", *options, *size, *save))
        evaluations = [record for record in records(run) if "validation_loss" in record]
        assert [record["iteration"] for record in evaluations] == [2, 3], "at step 2, and at the end"
        found += evaluations
    expected = gloo(1, answers_alone, tmp_path / "8", samples.folder)[0]
    assert [record["validation_loss"] for record in found] == pytest.approx([expected] * 4, rel=1e-5)
    perplexities = [record["validation_perplexity"] for record in found]
    assert perplexities == pytest.approx([math.exp(expected)] * 4, rel=1e-5)
    assert losses(tmp_path / "8") == pytest.approx([expected] * 3, rel=1e-5)
