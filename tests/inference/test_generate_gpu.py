"""Generation with one CUDA graph per step: the tokens of the same steps without, no waiting, flat memory."""

import itertools

import pytest
import torch

from tests.inference.models import prompts, random_family, random_model, whole_forward

pytestmark = pytest.mark.gpu
HYBRIDS = [
    ["gated_deltanet", "gla", "softmax"],
    ["mamba2", "rwkv7", "hgrn2", "rwkv7", "softmax"],
    ["mom_gated_deltanet", "mom_gla", "softmax"],
    ["retention", "gsa", "kda", "rwkv6", "based"],
]
LENGTHS = (50, 3, 90)
SHARED = ("--moe-shared-expert-intermediate-size", "32", "--gated-deltanet-conv-size", "4")


def rows():
    return [row[:length] for row, length in zip(prompts(3, 90), LENGTHS, strict=True)]


def both_ways(loaded, **options):
    """Tokens with and without graphs, and the generation with."""
    from linear_moe.inference.generate import Generation

    found = []
    for graph in (True, False):
        generation = Generation(loaded, rows(), max_new_tokens=150, graph=graph, **options)
        found.append((list(generation), generation))
    (captured, generation), (plain, other) = found
    assert generation.loop.why_no_graph is None and other.loop.graph is None
    return captured, plain, generation


@pytest.mark.parametrize("draw", [{}, {"temperature": 1.2, "top_p": 0.9, "seed": 4}], ids=["greedy", "drawn"])
@pytest.mark.parametrize("kinds", HYBRIDS, ids="-".join)
def test_graphs_change_no_token(kinds, draw):
    loaded = random_model(kinds, *SHARED, dtype=torch.bfloat16)
    captured, plain, generation = both_ways(loaded, **draw)
    assert generation.loop.graph is not None
    assert captured == plain and len(captured) == 150
    assert len({token for step in captured for token in step}) > 10
    if "softmax" in kinds:
        assert generation.decoder.context.growths >= 2, "the cache has to move within this test"


@pytest.mark.parametrize(("family", "size"), [("deepseek_v2", "A2.4B"), ("qwen3_next", "80B-A3B")])
def test_latent_attention_and_gates_of_shared_experts(family, size):
    loaded = random_family(family, size, ["gla", "softmax", "softmax"], dtype=torch.bfloat16)
    captured, plain, _ = both_ways(loaded)
    assert captured == plain


def test_ends_are_seen_whenever_the_host_looks():
    loaded = random_model(HYBRIDS[0], dtype=torch.bfloat16)
    captured, plain, _ = both_ways(loaded)
    ends = [captured[20][0], captured[33][1], captured[47][2]]
    for every in (1, 8, 64):
        captured, plain, _ = both_ways(loaded, eos=ends, look_every=every)
        assert captured == plain
        ended = [[token is None for token in step] for step in captured]
        assert all(not any(a and not b for a, b in zip(x, y)) for x, y in itertools.pairwise(ended))


def test_a_replayed_step_waits_for_nothing_and_needs_no_memory():
    from linear_moe.inference.generate import Generation

    loaded = random_model(HYBRIDS[2], dtype=torch.bfloat16)
    generation = Generation(loaded, [[1, 2, 3]] * 2, max_new_tokens=40)
    loop = generation.loop
    loop.start(generation.decoder.read(generation.prompts))
    for _ in range(3):
        loop.next()
    assert loop.graph is not None
    torch.cuda.synchronize()
    before, state = torch.cuda.memory_allocated(), generation.memory_size()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            loop.next()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_allocated() == before and generation.memory_size() == state


def test_float32_without_experts_is_the_whole_forward_pass():
    from linear_moe.inference.decoder import Decoder

    torch.backends.cuda.matmul.allow_tf32 = False
    loaded = random_model(["gated_deltanet", "mamba2", "softmax"], moe=False, dtype=torch.float32)
    decoder, more = Decoder(loaded.model, 3, 200), prompts(3, 4)
    logits = [decoder.read(rows())]
    logits += [decoder.step(torch.tensor([row[t] for row in more], device="cuda")) for t in range(4)]
    for i, row in enumerate(rows()):
        truth = whole_forward(loaded.model, [row + more[i]])[0, len(row) - 1 :]
        torch.testing.assert_close(
            torch.stack([x[i] for x in logits]), truth, rtol=2e-3, atol=2e-3 * truth.std().item()
        )


def test_experts_in_float32_say_what_they_cost():
    from linear_moe.inference.generate import Generation

    loaded = random_model(["gla", "softmax"], dtype=torch.float32)
    with pytest.raises(ValueError, match="cannot be captured"):
        Generation(loaded, [[1]], max_new_tokens=3, graph=True)
    with pytest.warns(UserWarning, match="without a CUDA graph"):
        steps = list(Generation(loaded, [[1]], max_new_tokens=3))
    assert len(steps) == 3


def test_scores_do_not_depend_on_the_batch():
    from linear_moe.inference.score import score

    loaded = random_model(HYBRIDS[0], *SHARED, dtype=torch.bfloat16)
    requests = [(row[:5], row[5:]) for row in (prompts(1, 80 + i)[0][i:] for i in range(9))]
    first = score(loaded, requests, batch_size=16)
    assert score(loaded, requests, batch_size=1) == first
    assert score(loaded, requests[::-1], batch_size=4)[::-1] == first
