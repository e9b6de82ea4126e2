"""Generation on the recurrent state equals the whole forward pass, recomputed from scratch for every token.

Random weights, float64, router too. Where a model reads all tokens at once and where it reads them one by one, the
next token is the same, for every mixer, pure and between softmax layers, dense and with experts.
"""

import dataclasses

import pytest
import torch

from tests.inference.models import VOCAB, prompts, random_model, whole_forward

MIXERS = ["linear_attention", "gla", "gated_deltanet"]
KINDS = (
    [[mixer] * 2 for mixer in MIXERS]
    + [[mixer, "softmax"] for mixer in MIXERS]
    + [["softmax", "gla", "softmax"]]
    # what layers share, heads and groups of their own, routing
    + [["rwkv7", "hgrn2", "mamba2", "mom_gla", "rwkv7", "hgrn2", "mom_gated_deltanet", "softmax"]]
)
FP64_ROUTER = ("--moe-router-dtype", "fp64")
TRAINING_ONLY = (
    *("--moe-expert-capacity-factor", "0.5", "--moe-input-jitter-eps", "0.1", "--moe-z-loss-coeff", "0.1"),
    *("--attention-dropout", "0.3", "--hidden-dropout", "0.3", "--recompute-granularity", "selective"),
)


def greedy_and_recomputed(rank, world, kinds, moe, extra):
    """Greedy continuation and, token by token, the argmax and the logits of the whole forward pass."""
    from linear_moe.inference.decoder import Decoder
    from linear_moe.inference.generate import Generation, generate

    loaded = random_model(kinds, *FP64_ROUTER, *extra, moe=moe)
    start, steps = prompts(2, 17), 12
    continued = generate(loaded, start, max_new_tokens=steps)
    in_chunks = list(Generation(loaded, start, max_new_tokens=steps, prefill_chunk=5))
    alone = generate(loaded, start[1:], max_new_tokens=steps)

    text = [prompt + new for prompt, new in zip(start, continued, strict=True)]
    decoder = Decoder(loaded.model, 2, 17 + steps)
    stepwise = [decoder.feed(torch.tensor(start), chunk=3)]
    stepwise += [decoder.feed(torch.tensor([[row[t]] for row in text])) for t in range(17, 16 + steps)]
    recomputed = [whole_forward(loaded.model, [row[: 17 + n] for row in text])[:, -1] for n in range(steps)]
    argmax = [logits[:, :VOCAB].argmax(-1).tolist() for logits in recomputed]
    error = max((a - b).abs().max().item() for a, b in zip(stepwise, recomputed, strict=True))
    spread = recomputed[0].std().item()
    return continued, in_chunks, alone, argmax, error / spread


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
def test_greedy_is_the_argmax_of_the_whole_forward_pass(gloo, kinds, moe):
    continued, in_chunks, alone, argmax, error = gloo(1, greedy_and_recomputed, kinds, moe, ())[0]
    assert [list(step) for step in zip(*continued, strict=True)] == argmax
    assert in_chunks == argmax
    assert alone == continued[1:]
    assert error < 1e-10, error
    assert len({token for row in continued for token in row}) > 4, "a model that repeats itself tests nothing"


def test_nothing_of_training_is_left_in_the_router(gloo):
    kinds = ["gated_deltanet", "softmax"]
    continued, _, _, argmax, error = gloo(1, greedy_and_recomputed, kinds, True, TRAINING_ONLY)[0]
    assert [list(step) for step in zip(*continued, strict=True)] == argmax
    assert error < 1e-10, error
    assert continued == gloo(1, greedy_and_recomputed, kinds, True, ())[0][0], (
        "other experts than without them"
    )


def test_a_memory_takes_all_tokens_in_generation(gloo):
    """How many it took in training depends on the other tokens of the call."""
    kinds, limit = ["mom_gla", "softmax"], ("--mom-gla-capacity", "0.3")
    continued, _, _, argmax, error = gloo(1, greedy_and_recomputed, kinds, False, limit)[0]
    assert [list(step) for step in zip(*continued, strict=True)] == argmax
    assert error < 1e-10, error
    assert continued == gloo(1, greedy_and_recomputed, kinds, False, ())[0][0]


def float32_error(rank, world, kinds):
    from linear_moe.inference.decoder import Decoder

    loaded = random_model(kinds, dtype=torch.float32)
    text = prompts(2, 40)
    decoder = Decoder(loaded.model, 2, 40)
    stepwise = [decoder.feed(torch.tensor([row[:20] for row in text]))]
    stepwise += [decoder.feed(torch.tensor([[row[t]] for row in text])) for t in range(20, 40)]
    recomputed = whole_forward(loaded.model, text)[:, 19:]
    return ((torch.stack(stepwise, 1) - recomputed).abs().max() / recomputed.std()).item()


def test_a_state_has_all_that_is_kept(gloo):
    """Mamba2: the groups' last inputs; RWKV7: the layer's; retention: its place in the document."""
    batch, hidden, heads = 3, 64, 4
    sizes = gloo(1, memory_sizes, ["mamba2", "rwkv7", "retention"])[0]
    mamba2 = 4 * batch * (heads * 32 * 16 + 3 * (heads * 32 + 2 * 16))
    rwkv7 = 4 * batch * (heads * 16 * 16 + hidden)
    retention = 4 * batch * heads * 16 * 32 + 8 * batch
    assert {recurrent for recurrent, _ in sizes.values()} == {mamba2 + rwkv7 + retention}


def test_float32_is_as_close_as_float32_allows(gloo):
    assert gloo(1, float32_error, [*MIXERS, "softmax"])[0] < 2e-4


def memory_sizes(rank, world, kinds):
    from linear_moe.inference.decoder import Decoder

    loaded = random_model(kinds, "--gated-deltanet-conv-size", "4", dtype=torch.float32)
    sizes = {}
    for length in (1, 8, 64):
        decoder = Decoder(loaded.model, 3, 100)
        decoder.feed(torch.tensor(prompts(3, length)))
        decoder.feed(torch.tensor(prompts(3, 1)))
        sizes[length] = dataclasses.astuple(
            decoder.memory_size()
        )  # the class would import Megatron in the test
    return sizes


def test_the_recurrent_state_does_not_grow(gloo):
    heads, width, batch, room = 4, 16, 3, 64 * 2  # a row has 1, 8 or 64 tokens, and one more
    sizes = gloo(1, memory_sizes, ["gated_deltanet", "softmax", "linear_attention"])[0]
    states = 2 * batch * heads * width * width
    tail = batch * 3 * heads * 3 * width  # conv_size - 1 inputs of q, k and v
    for length, (recurrent, kv_cache) in sizes.items():
        assert recurrent == 4 * (states + tail)
        assert kv_cache == 4 * 2 * (room if length == 64 else 64) * batch * heads * width


def drawn(rank, world):
    import dataclasses

    from linear_moe.inference.generate import Generation, generate

    loaded = random_model(["gla", "softmax"], *FP64_ROUTER)
    start = [[token % 60 for token in row] for row in prompts(2, 5)]
    half = dataclasses.replace(loaded, vocab_size=60)
    draw = {"max_new_tokens": 20, "temperature": 1.5, "top_k": 50, "top_p": 0.95}
    greedy = generate(loaded, start, max_new_tokens=20)
    second = greedy[0][1]
    ended = list(Generation(loaded, start, max_new_tokens=20, eos=second))
    return {
        "seed 1": generate(loaded, start, seed=1, **draw),
        "seed 1 again": generate(loaded, start, seed=1, **draw),
        "seed 2": generate(loaded, start, seed=2, **draw),
        "greedy": greedy,
        "top-k 1": generate(loaded, start, max_new_tokens=20, temperature=1.0, top_k=1),
        "ended": ended,
        "ended lists": generate(loaded, start, max_new_tokens=20, eos=second),
        "half": generate(half, start, max_new_tokens=20, temperature=5.0),
        "none": generate(loaded, start, max_new_tokens=0),
        "no prompts": generate(loaded, [], max_new_tokens=3),
    }


def test_draws_seeds_and_ends(gloo):
    out = gloo(1, drawn)[0]
    assert out["seed 1"] == out["seed 1 again"] != out["seed 2"]
    assert out["top-k 1"] == out["greedy"]
    assert all(token < 60 for row in out["half"] for token in row), "a row of padding was drawn"
    second = out["greedy"][0][1]
    cut = [row[: row.index(second)] if second in row else row for row in out["greedy"]]
    assert out["ended lists"] == cut
    assert len(out["ended"]) == max(map(len, cut))
    assert out["ended"][0][0] == out["greedy"][0][0] and all(step[0] is None for step in out["ended"][1:])
    assert out["none"] == [[], []] and out["no prompts"] == []


def refusals(rank, world):
    import dataclasses

    from linear_moe.inference.generate import generate

    loaded = dataclasses.replace(random_model(["gla"], moe=False), max_sequence_length=16)
    cases = {
        "empty": ([[]], {}),
        "vocabulary": ([[VOCAB]], {}),
        "too long": ([[1] * 10], {"max_new_tokens": 7}),
        "negative": ([[1]], {"max_new_tokens": -1}),
        "temperature": ([[1]], {"temperature": -1.0}),
        "top_p": ([[1]], {"top_p": 0.0}),
        "top_k": ([[1]], {"top_k": -3}),
        "seeds": ([[1], [2]], {"seed": [1, 2, 3]}),
        "graph": ([[1]], {"graph": True}),
    }
    errors = {}
    for name, (tokens, options) in cases.items():
        try:
            generate(loaded, tokens, **({"max_new_tokens": 2} | options))
        except ValueError as error:
            errors[name] = str(error)
    return errors


def test_impossible_requests_are_refused(gloo):
    errors = gloo(1, refusals)[0]
    texts = {
        "empty": "no tokens",
        "vocabulary": f"token {VOCAB} is not",
        "too long": "reach 17 tokens",
        "negative": "max_new_tokens is -1",
        "temperature": "temperature is -1.0",
        "top_p": "top_p is 0.0",
        "top_k": "top_k is -3",
        "seeds": "3 seeds for 2 prompts",
        "graph": "cannot be captured",
    }
    assert errors.keys() == texts.keys()
    for name, text in texts.items():
        assert text in errors[name] and "\n  why: " in errors[name] and "\n  try: " in errors[name]
