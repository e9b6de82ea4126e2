"""A tiny model learns toy instructions and stops by itself; a run in two parts is the run in one; validation."""

from pathlib import Path

from tests.finetune.chat import CAPITALS, chat_tokenizer, prepared, toy_messages, write_lines
from tests.finetune.runs import arguments
from tests.training.tiny import losses, train

LEARN = [
    *("--train-iters", "60", "--lr", "1e-2", "--min-lr", "1e-3", "--lr-warmup-iters", "2"),
    *("--weight-decay", "0.01", "--global-batch-size", "8", "--micro-batch-size", "8"),
]


def answers(rank: int, world: int, run: Path) -> dict[str, tuple[list[int], list[int]]]:
    """Tokens that the model says to each country, at most 12, and those of its capital."""
    import transformers

    from linear_moe.inference.generate import generate
    from linear_moe.inference.load import load_model

    loaded = load_model(run)
    tokenizer = transformers.AutoTokenizer.from_pretrained(loaded.tokenizer.path)
    said = {}
    for country, capital in CAPITALS.items():
        question = [{"role": "user", "content": country}]
        prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
        (output,) = generate(loaded, [prompt], max_new_tokens=12, eos=loaded.tokenizer.eod)
        said[country] = output, tokenizer(capital, add_special_tokens=False)["input_ids"]
    return said


def test_toy_instructions_are_learned(gloo, tmp_path):
    tokenizer = chat_tokenizer(tmp_path / "tokenizer")
    samples = prepared(tokenizer, write_lines(tmp_path / "toy.jsonl", toy_messages()), tmp_path / "cache")
    run = tmp_path / "run"
    argv = arguments(
        run, samples, tokenizer, "gated_deltanet,softmax", *LEARN, "--save", str(run / "checkpoint")
    )
    gloo(1, train, argv)
    import time

    t = time.time()
    (said,) = gloo(1, answers, run)
    print(time.time() - t, losses(run)[::10])
    assert {country: output for country, (output, _) in said.items()} == {
        country: capital for country, (_, capital) in said.items()
    }
