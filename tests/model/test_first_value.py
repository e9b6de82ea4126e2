"""The first layer's value on its way to later layers and stages, message by message, without any process but this."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from linear_moe.model.mixer_layer import FirstValue
from linear_moe.model.sharing import _carry, _crosses

B, T, H, V, D = 3, 8, 2, 5, 7
TRUTH = torch.randn(B, T, H, V, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("tokens", [T, T // 2], ids=["whole", "sequence parallel"])
@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16])
def test_a_message_is_the_value(tokens, wide):
    """In the dtype of the hidden states it rides behind; what comes out has that of the projections."""
    sent, received = FirstValue(TRUTH.to(torch.bfloat16)), FirstValue()
    message = sent.message(torch.zeros(tokens, B, D, dtype=wide))
    assert message.shape[:2] == (tokens, B) and message.dtype == wide
    received.receive(message, (H, V), torch.bfloat16)
    assert received.x_BTHV.dtype == torch.bfloat16
    assert torch.equal(received.x_BTHV, TRUTH.to(torch.bfloat16))


def test_the_last_who_takes_it_leaves_nothing():
    value = FirstValue(TRUTH)
    assert value.take(keep=True) is TRUTH and value.take(keep=False) is TRUTH
    assert value.x_BTHV is None
    value = FirstValue(TRUTH)
    value.message(torch.zeros(T, B, D))
    with pytest.raises(AssertionError, match="no earlier layer"):
        value.take(keep=True)


@pytest.mark.parametrize("kinds", [kinds for kinds in itertools.product("ab", repeat=5) if "a" in kinds])
def test_it_crosses_where_somebody_has_it_and_somebody_wants_it(kinds):
    config = SimpleNamespace(layer_kinds=kinds)
    users = [i for i, kind in enumerate(kinds) if kind == "a"]
    for start, end in itertools.combinations(range(len(kinds) + 1), 2):
        enters, leaves = _crosses(config, "a", list(range(start, end)))
        assert enters == (any(i < start for i in users) and any(i >= start for i in users))
        assert leaves == (any(i < end for i in users) and any(i >= end for i in users))
    assert _crosses(config, "a", []) == (False, False)


@pytest.mark.parametrize("listed", [False, True])
def test_it_rides_behind_the_hidden_states(listed):
    sent, received, hooks, seen = FirstValue(TRUTH), FirstValue(), [], []
    config = SimpleNamespace(hidden_size=D, params_dtype=torch.float32)
    first = SimpleNamespace(decoder=SimpleNamespace(register_forward_hook=hooks.append))
    second = SimpleNamespace(set_input_tensor=seen.append, config=config)
    _carry(first, sent, (H, V), enters=False, leaves=True)
    _carry(second, received, (H, V), enters=True, leaves=False)
    hidden = torch.randn(T, B, D)
    (hook,) = hooks
    message = hook(None, (), hidden)
    assert message.shape == (T, B, D + H * V)
    second.set_input_tensor([message] if listed else message)
    (found,) = seen
    assert torch.equal(found[0] if listed else found, hidden) and isinstance(found, list) == listed
    assert torch.equal(received.x_BTHV, TRUTH)
    second.set_input_tensor([None] if listed else None)  # an evaluation without a message
    assert seen[1:] == [[None] if listed else None]
