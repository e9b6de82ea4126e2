"""What a decoder holds and how long its rows are, and that a place far on, for measurements, has the room asked for."""

import torch

from tests.inference.models import prompts, random_model

ROWS, HEADS, CHANNELS, BYTES = 3, 4, 16, 8
"""Of a tiny model in float64, whose softmax layer has as many keys as queries."""


def held(rank, world):
    """Before anything is read, after rows of several lengths, and far on."""
    from linear_moe.inference.decoder import Decoder

    model = random_model(["gla", "softmax", "linear_attention"], moe=False).model
    decoder = Decoder(model, ROWS, 1000)
    empty = decoder.memory_size()
    decoder.read([prompts(1, 9)[0][:length] for length in (5, 9, 2)])
    read = decoder.length, decoder.memory_size()
    decoder.step(torch.tensor([1, 2, 3]))
    decoder.jump(300, room=200)
    growths = decoder.context.growths
    for _ in range(200):
        decoder.context.prepare_step()
    return empty, read, decoder.length, decoder.context.growths - growths, decoder.memory_size()


def test_bytes_and_lengths(gloo):
    """States are keys x values of a head, in gla of half the keys; the cache has places for 64 tokens, then 512."""
    empty, (length, read), far, growths, large = gloo(1, held)[0]
    states = ROWS * HEADS * (CHANNELS // 2 + CHANNELS) * CHANNELS * BYTES
    place = 2 * ROWS * HEADS * CHANNELS * BYTES
    assert (empty.recurrent, empty.kv_cache) == (0, 0)
    assert length == 9 and (read.recurrent, read.kv_cache) == (states, 64 * place)
    assert far == 500 and growths == 0, "the room is there before the steps are timed"
    assert large.recurrent == states and large.kv_cache == 512 * place


def refusals(rank, world):
    """What a decoder says of a model whose mixer does not decode, or reads no rows of different length."""
    from linear_moe import lsm
    from linear_moe.inference.decoder import Decoder

    model, found = random_model(["gla"], moe=False).model, []
    try:
        for layout, rows in (("decode", 1), ("packed", 1), ("packed", 2)):
            lsm.get("gla").unsupported = {layout: "it looks at the future"}
            try:
                found.append(Decoder(model, rows, 100).length)
            except ValueError as error:
                found.append(str(error).splitlines()[:2])
    finally:
        lsm.get("gla").unsupported = {}
    return found


def test_a_mixer_that_cannot_decode_is_refused(gloo):
    why = "  why: it looks at the future"
    decode, alone, several = gloo(1, refusals)[0]
    assert decode == ["mixer gla does not support generation from a recurrent state (decode)", why]
    assert alone == 0 and several == [
        "mixer gla does not support documents packed in one sequence (packed)",
        why,
    ]
