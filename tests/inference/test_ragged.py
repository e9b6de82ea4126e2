"""Rows of different length in one batch: each gives the logits and tokens that it gives alone, read whole.

The truth is the forward pass of training over one row without any memory. Float64, router too; every mixer.
"""

from unittest.mock import patch

import pytest
import torch

from linear_moe import lsm
from tests.inference.models import prompts, random_family, random_model, whole_forward

LENGTHS = (17, 1, 70, 4)
NAMES = lsm.names()
GROUPS = [NAMES[i : i + 6] for i in range(0, len(NAMES), 6)]
SMALL = ("--moe-router-dtype", "fp64", "--gated-deltanet-conv-size", "4", "--gla-conv-size", "3")


def rows():
    return [prompts(1, 70)[0][:length] for length in LENGTHS]


def errors(rank, world, kinds, extra, family=None):
    """Largest differences of logits from the whole forward pass, after reading and over steps."""
    from linear_moe.inference.decoder import Decoder

    if family is None:
        loaded = random_model(kinds, *SMALL, *extra)
    else:
        loaded = random_family(*family, kinds, *SMALL[:2], *extra)
    text, more = rows(), prompts(len(LENGTHS), 5)
    text[2] = text[2][:64] if "--position-embedding-type" in extra else text[2]
    truth = [whole_forward(loaded.model, [a + b])[0] for a, b in zip(text, more, strict=True)]
    found = {}
    for name, chunk in (("at once", 4096), ("in chunks", 4 * 9)):
        decoder = Decoder(loaded.model, len(text), 100)
        logits = [decoder.read(text, chunk)]
        logits += [decoder.step(torch.tensor([row[t] for row in more])) for t in range(4)]
        # and on, rows of different length again, after steps
        rest = [row[4:] for row in more]
        logits.append(decoder.read(rest, chunk))
        places = [[len(row) - 1 + t for t in range(6)] for row in text]
        wanted = torch.stack([x[p] for x, p in zip(truth, places, strict=True)], dim=1)
        spread = wanted.std()
        found[name] = ((torch.stack(logits) - wanted).abs().max() / spread).item()
    return found


@pytest.mark.parametrize("kinds", GROUPS, ids="-".join)
def test_padding_does_not_exist(gloo, kinds):
    found = gloo(1, errors, [*kinds, "softmax"], ())[0]
    assert max(found.values()) < 1e-10, found


@pytest.mark.parametrize(
    "extra",
    [
        ("--num-query-groups", "2", "--qk-layernorm"),
        ("--position-embedding-type", "learned_absolute", "--max-position-embeddings", "128"),
        ("--moe-shared-expert-intermediate-size", "32", "--moe-shared-expert-gate"),
        ("--sequential-experts",),
        ("--no-rope-freq", "2"),
        ("--moe-router-score-function", "sigmoid", "--moe-router-enable-expert-bias"),
    ],
    ids=["groups", "learned", "shared", "sequential", "no positions", "sigmoid"],
)
def test_kinds_of_attention_and_experts(gloo, extra):
    found = gloo(1, errors, ["gla", "softmax"], extra)[0]
    bound = 1e-6 if "sigmoid" in extra else 1e-10  # Megatron's sigmoid is float32 whatever the router's dtype
    assert max(found.values()) < bound, found


@pytest.mark.parametrize(
    "family",
    [("deepseek_v2", "A2.4B"), ("deepseek_v2", "A21B"), ("llama3", "8B"), ("qwen3_next", "80B-A3B")],
    ids="-".join,
)
def test_families(gloo, family):
    """Latent attention, compressed queries or not, groups of experts; scaled rotary embeddings; gated outputs."""
    found = gloo(1, errors, ["gla", "softmax", "softmax"], (), family)[0]
    assert max(found.values()) < 1e-9, found


def without_megatrons_gate(rank, world):
    from megatron.core.transformer.attention import SelfAttention

    from linear_moe.inference.decoder import Decoder

    loaded = random_family("qwen3_next", "80B-A3B", ["softmax", "softmax"], *SMALL[:2])
    text = [[1, 5, 9, 2, 4], [3, 3, 7, 8, 1]]
    whole_BTV = whole_forward(loaded.model, text)
    with patch.object(SelfAttention, "_apply_output_gate", side_effect=AssertionError):
        decoder = Decoder(loaded.model, 2, 8)
        found = [
            decoder.read([row[:4] for row in text]),
            decoder.step(torch.tensor([row[4] for row in text])),
        ]
    return float((torch.stack(found, 1) - whole_BTV[:, 3:]).abs().max())


def test_output_gates_are_not_compiled_for_every_shape(gloo):
    """Megatron's method is, by torch, where there is a GPU."""
    assert gloo(1, without_megatrons_gate)[0] < 1e-9


@pytest.mark.parametrize(
    "extra",
    [
        ("--mom-gla-shared-memory", "false", "--mom-gla-topk", "1"),
        ("--mom-gla-single-projection", "true", "--mom-gla-conv-size", "4"),
        ("--mom-gla-conv-size", "3", "--mom-gla-num-memories", "6", "--mom-gla-topk", "3"),
    ],
    ids=["not shared", "single", "six"],
)
def test_mixtures_of_memories(gloo, extra):
    found = gloo(1, errors, ["mom_gla", "softmax", "mom_gla"], extra)[0]
    assert max(found.values()) < 1e-10, found


def batches(rank, world):
    from linear_moe.inference.generate import Generation, generate

    loaded = random_model(["gated_deltanet", "mom_gla", "softmax"], *SMALL)
    text = rows()
    draw = {"max_new_tokens": 30, "temperature": 1.5, "top_p": 0.9}
    free = generate(loaded, text, seed=[4, 9, 2, 7], **draw)
    ends = [free[0][3], free[2][9]]
    return {
        "free": free,
        "alone": [generate(loaded, [row], seed=s, **draw)[0] for row, s in zip(text, (4, 9, 2, 7))],
        "reversed": generate(loaded, text[::-1], seed=[7, 2, 9, 4], **draw)[::-1],
        "longer": generate(loaded, text, seed=[4, 9, 2, 7], **(draw | {"max_new_tokens": 40})),
        "counted": generate(loaded, text, seed=4, **draw)[1]
        == generate(loaded, text[1:2], seed=5, **draw)[0],
        "ends": ends,
        "ended": generate(loaded, text, seed=[4, 9, 2, 7], eos=ends, **draw),
        "looked": [
            list(Generation(loaded, text, seed=[4, 9, 2, 7], eos=ends, look_every=n, **draw))
            for n in (1, 7, 99)
        ],
    }


def test_a_row_draws_and_ends_by_itself(gloo):
    out = gloo(1, batches)[0]
    assert out["free"] == out["alone"] == out["reversed"] == [row[:30] for row in out["longer"]]
    assert out["counted"], "seed + i is the seed of row i"
    cut = []
    for row in out["free"]:
        places = [i for i, token in enumerate(row) if token in out["ends"]]
        cut.append(row[: places[0]] if places else row)
    assert out["ended"] == cut and min(map(len, cut)) < max(map(len, cut))
    steps = out["looked"][0]
    assert out["looked"] == [steps] * 3, "how often the host looks changes nothing"
    for column, row in zip(zip(*steps, strict=True), cut, strict=True):
        assert list(column) == row + [None] * (len(steps) - len(row)), "an ended row stays ended"


def largest_call(rank, world):
    """Tokens of each call, and the capacity, while a long prompt is read."""
    from linear_moe.inference.decoder import Decoder

    decoder, seen = Decoder(random_model(["gla", "softmax"]).model, 2, 400), []
    begin = decoder.context.begin_reading

    def recorded(counts, packed=None):
        seen.append((sum(counts), decoder.context.max_sequence_length))
        return begin(counts, packed)

    decoder.context.begin_reading = recorded
    decoder.read([prompts(1, 300)[0], prompts(1, 90)[0]], chunk=64)
    return seen


def test_a_long_prompt_is_read_in_small_calls_with_one_allocation(gloo):
    seen = gloo(1, largest_call)[0]
    assert sum(tokens for tokens, _ in seen) == 390 and max(tokens for tokens, _ in seen) == 64
    assert {capacity for _, capacity in seen} == {320}


def addresses(rank, world):
    """Where everything is that a step uses: the same until the cache grows, which it does seldom."""
    from linear_moe.inference.decoder import Decoder
    from linear_moe.model.decoding import KeyValueCache, state_tensors

    loaded = random_model(["rwkv7", "mamba2", "mom_gated_deltanet", "softmax"], *SMALL, dtype=torch.float32)
    decoder = Decoder(loaded.model, 2, 5000)
    decoder.read([[1, 2, 3], [4]])
    context, seen = decoder.context, []
    for _ in range(70):
        decoder.step(torch.tensor([1, 2]))
        held = [
            x.tensors if isinstance(x, KeyValueCache) else state_tensors(x)
            for x in context.key_value_memory_dict.values()
        ]
        where = tuple(tensor.data_ptr() for tensors in held for tensor in tensors)
        seen.append((context.growths, where, decoder.memory_size().recurrent))
    capacities = []
    for length in range(100, 5000, 10):
        decoder.jump(length)
        capacities.append((length, context.max_sequence_length))
    return seen, capacities, decoder.memory_size().recurrent


def test_addresses_stay_until_the_cache_grows(gloo):
    seen, capacities, recurrent = gloo(1, addresses)[0]
    assert [growths for growths, _, _ in seen] == [1] * 61 + [2] * 9, "64 places, three of them read before"
    first, second = seen[0], seen[-1]
    assert all(entry == (first if entry[0] == 1 else second) for entry in seen)
    mixers = len(first[1]) - 2
    assert first[1][:mixers] == second[1][:mixers], "states of mixers never move"
    assert first[2] == second[2] == recurrent, "nor grow"
    assert all(length <= capacity <= max(1.25 * length + 64, 128) for length, capacity in capacities)
    assert len({capacity for _, capacity in capacities}) <= 20
