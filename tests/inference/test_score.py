"""Scores: the definition on whole rows, and the same bits in every batch, order and padding."""

import pytest
import torch

from tests.inference.models import VOCAB, prompts, random_model, whole_forward

KINDS = ["gated_deltanet", "rwkv7", "mom_gla", "mamba2", "softmax"]
ROUTER = ("--moe-router-dtype", "fp64")


def requests():
    """Rows of 2 to 90 tokens; the continuation is from one token to all but one."""
    generator = torch.Generator().manual_seed(5)
    row, found = prompts(1, 100)[0], []
    for _ in range(16):
        length = int(torch.randint(2, 90, (), generator=generator))
        start = int(torch.randint(0, 10, (), generator=generator))
        context = int(torch.randint(1, length, (), generator=generator))
        text = row[start : start + length]
        found.append((text[:context], text[context:]))
    return [*found, ([3], []), ([4], [5])]


def scored(rank, world, dtype, options):
    from linear_moe.inference.score import score

    loaded = random_model(KINDS, *ROUTER, dtype=dtype)
    return [[(s.log_likelihoods, s.is_greedy) for s in score(loaded, requests(), **o)] for o in options]


def defined(rank, world):
    found = []
    model = random_model(KINDS, *ROUTER).model
    for context, continuation in requests():
        logits = whole_forward(model, [[*context, *continuation]])[0, len(context) - 1 : -1, :VOCAB]
        index = torch.tensor(continuation, dtype=torch.int64)[:, None]
        values = logits.log_softmax(-1).gather(1, index).flatten().tolist()
        found.append((values, logits.argmax(-1).tolist() == continuation))
    return found


def test_scores_are_those_of_the_whole_row(gloo):
    truth = gloo(1, defined)[0]
    options = [{}, {"tokens_per_call": 32}, {"tokens_per_call": 33, "batch_size": 3}]
    for found in gloo(1, scored, torch.float64, options)[0]:
        for (values, is_greedy), (wanted, wanted_greedy) in zip(found, truth, strict=True):
            assert values == pytest.approx(wanted, abs=1e-10) and is_greedy == wanted_greedy
    assert truth[-2] == ([], True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_at_every_batch_size(gloo, dtype):
    options = [{"batch_size": n, "tokens_per_call": 128} for n in (16, 1, 5)]
    first, *others = gloo(1, scored, dtype, options)[0]
    assert others == [first, first]
    values = torch.tensor([value for row, _ in first for value in row], dtype=torch.float64)
    assert (values != values.bfloat16()).double().mean() > 0.9, "logits of bfloat16, their sums of float32"


GROUPS = [
    ([4, 4, 1], 16, [[0, 1], [2]]),
    ([4, 5, 3], 16, [[0], [1, 2]]),
    ([1, 1, 1, 1, 1], 2, [[0, 1], [2, 3], [4]]),
    ([3, 20, 3], 16, [[0], [1], [2]]),
    ([20, 0, 1], 16, [[0], [1, 2]]),
    ([], 16, []),
]
"""Lengths of rows, most rows of a call, and the rows of each call of 8 tokens."""


def grouped(rank, world):
    from linear_moe.inference.score import Score, _groups

    assert Score([-1.0, -0.5], True).total == -1.5
    return [list(_groups(lengths, batch_size, 8)) for lengths, batch_size, _ in GROUPS]


def test_rows_share_a_call_as_far_as_they_have_room(gloo):
    """In order; a longer row is alone."""
    assert gloo(1, grouped)[0] == [groups for *_, groups in GROUPS]


def padded(rank, world):
    from linear_moe.inference.score import score, score_padded

    loaded = random_model(KINDS, *ROUTER, dtype=torch.float32)
    rows = [context + continuation for context, continuation in requests()[:6]] + [[7], []]
    width = max(map(len, rows)) + 3
    found = {}
    for side in ("left", "right", "both"):
        tokens = torch.full((len(rows), width), 11)
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for i, row in enumerate(rows):
            start = {"left": width - len(row), "right": 0, "both": (width - len(row)) // 2}[side]
            tokens[i, start : start + len(row)] = torch.tensor(row, dtype=torch.int64)
            mask[i, start : start + len(row)] = True
        values = score_padded(loaded, tokens, mask, tokens_per_call=128)
        assert not values[~mask].any()
        found[side] = [value[m].tolist() for value, m in zip(values, mask, strict=True)]
    alone = [score(loaded, [(row[:1], row[1:])], tokens_per_call=128)[0] for row in rows if len(row) > 1]
    return found, [[0.0, *s.log_likelihoods] for s in alone]


def test_padding_changes_no_bit(gloo):
    found, alone = gloo(1, padded)[0]
    assert found["left"] == found["right"] == found["both"] == [*alone, [0.0], []]


def refusals(rank, world):
    import dataclasses

    from linear_moe.inference.score import score

    loaded = dataclasses.replace(random_model(["gla"], moe=False), max_sequence_length=16)
    errors = []
    for request, options in (
        (([], [1]), {}),
        (([1], [VOCAB]), {}),
        (([1] * 9, [1] * 8), {}),
        (([1], [1]), {"batch_size": 0}),
    ):
        try:
            score(loaded, [request], **options)
        except ValueError as error:
            errors.append(str(error))
    return errors


def test_refusals(gloo):
    errors = gloo(1, refusals)[0]
    for error, text in zip(
        errors, ("no tokens", f"token {VOCAB} is not", "have 17 tokens", "batch_size is 0"), strict=True
    ):
        assert text in error and "\n  why: " in error and "\n  try: " in error
