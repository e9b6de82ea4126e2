"""Where a mixer's state is looked for while decoding, and what it does not decode."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.inference.contexts.static_context import StaticInferenceContext

from linear_moe.lsm import MixerState
from linear_moe.model.decoding import DecodingContext
from linear_moe.model.mixer_layer import MixerLayer
from linear_moe.parallel.layout import SequenceLayout

LAYER = SimpleNamespace(layer_number=2)
PACKED = torch.tensor([[0, 3, 8]], dtype=torch.int32)


def test_states_are_kept_by_layer():
    context, state = StaticInferenceContext(1, 8), MixerState(())
    assert MixerLayer._state(LAYER, SequenceLayout(1, 8), context) is None
    context.key_value_memory_dict |= {1: MixerState(()), 2: state}
    assert MixerLayer._state(LAYER, SequenceLayout(1, 8), context) is state


def test_packed_rows_are_read_by_a_context_that_knows_them():
    layout = SequenceLayout(1, 8, cu_seqlens=PACKED)
    assert MixerLayer._state(LAYER, layout, DecodingContext(2, 64, torch.device("cpu"))) is None
    with pytest.raises(ValueError, match=r"\n  why: .*\n  try: .*Decoder"):
        MixerLayer._state(LAYER, layout, StaticInferenceContext(1, 8))


@pytest.mark.parametrize("cp_size, is_static", [(2, True), (1, False)])
def test_what_is_not_decoded_says_what_to_do(cp_size, is_static):
    context = SimpleNamespace(is_static_batching=lambda: is_static, key_value_memory_dict={})
    with pytest.raises(ValueError, match=r"static batching.*\n  why: .*\n  try: "):
        MixerLayer._state(LAYER, SequenceLayout(1, 8, cp_size), context)
