"""The token loops themselves, on two tokens worked out by hand with one head and K = V = 1."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from linear_moe.kernels import reference


def row(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1)


HALF = math.log(0.5)
Q, K, V = row(2, 10), row(3, 5), row(7, 11)
STATE = row(100)


def test_diagonal_decay_applies_before_the_write_and_the_read_after_it() -> None:
    o, state = reference.diag_decay(Q, K, V, row(HALF, HALF)[..., 0], scale=0.1, state=STATE)
    first = 0.5 * 100 + 3 * 7
    second = 0.5 * first + 5 * 11
    assert o.flatten().tolist() == pytest.approx([0.1 * 2 * first, 0.1 * 10 * second])
    assert state.item() == pytest.approx(second)


def test_row_column_and_head_decays_multiply() -> None:
    _, state = reference.diag_decay(Q, K, V, row(HALF, HALF), log_decay_v=row(HALF, HALF), state=STATE)
    assert state.item() == pytest.approx(0.25 * (0.25 * 100 + 21) + 55)
    _, state = reference.diag_decay(Q, K, V, torch.tensor([HALF]).double(), state=STATE)
    assert state.item() == pytest.approx(0.5 * (0.5 * 100 + 21) + 55)


def test_bonus_reads_before_the_decay() -> None:
    bonus = torch.tensor([[4.0]], dtype=torch.float64)
    o, state = reference.diag_decay(Q, K, V, row(HALF, HALF), bonus=bonus, state=STATE)
    first = 0.5 * 100 + 21
    assert o.flatten().tolist() == pytest.approx([2 * (100 + 4 * 21), 10 * (first + 4 * 55)])
    assert state.item() == pytest.approx(0.5 * first + 55)


def test_delta_rule_decays_then_erases_then_writes() -> None:
    beta = row(0.5, 1.0)[..., 0]
    o, state = reference.delta_rule(Q, row(1, 0.5), V, beta, row(HALF, HALF), state=STATE)
    first = 50 - 0.5 * 50 + 0.5 * 7
    decayed = 0.5 * first
    second = decayed - 0.25 * decayed + 0.5 * 11
    assert o.flatten().tolist() == pytest.approx([2 * first, 10 * second])
    assert state.item() == pytest.approx(second)


def test_dplr_reads_before_the_decay_and_leaves_the_write_alone() -> None:
    o, state = reference.dplr_delta_rule(
        Q, K, V, row(-1, 0.5), row(0.25, 2), row(HALF, HALF), scale=0.1, state=STATE
    )
    first = 0.5 * 100 - 0.25 * 100 + 3 * 7
    second = 0.5 * first + 2 * 0.5 * first + 5 * 11
    assert o.flatten().tolist() == pytest.approx([0.1 * 2 * first, 0.1 * 10 * second])
    assert state.item() == pytest.approx(second)


def test_dplr_reads_under_a_and_adds_under_b() -> None:
    """Two keys, so that a and b, and rows and columns, cannot be confused."""
    x, y = torch.eye(2, dtype=torch.float64)
    memory = torch.tensor([[10.0, 20], [30, 40]], dtype=torch.float64).view(1, 1, 2, 2)
    zero = torch.zeros(1, 1, 1, 2, dtype=torch.float64)
    a, b, log_decay = x.expand(1, 1, 1, 2), y.expand(1, 1, 1, 2), torch.tensor([HALF, 0.0]).double()
    _, state = reference.dplr_delta_rule(zero, zero, zero, a, b, log_decay.view(1, 1, 1, 2), state=memory)
    assert state.squeeze().flatten().tolist() == pytest.approx([5, 10, 30 + 10, 40 + 20])


def test_heads_share_the_keys_of_their_group() -> None:
    q = k = torch.eye(2, dtype=torch.float64).view(1, 1, 2, 2)
    v = torch.arange(1.0, 5.0, dtype=torch.float64).view(1, 1, 4, 1)
    _, state = reference.diag_decay(q, k, v)
    assert state.squeeze().tolist() == [[1, 0], [2, 0], [0, 3], [0, 4]]


def test_short_convolution() -> None:
    x, weight = row(1, 2, 3)[..., 0], torch.tensor([[10.0, 1.0]], dtype=torch.float64)
    y, state = reference.short_conv(x, weight, torch.tensor([0.5]), state=row(7)[..., 0])
    assert y.flatten().tolist() == [71.5, 12.5, 23.5]
    assert state.item() == 3
