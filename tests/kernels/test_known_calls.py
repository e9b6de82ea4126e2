"""A call like an earlier one is not checked and picked again, away from CPUs; any other call is."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from linear_moe import kernels
from linear_moe.kernels import checks, dispatch


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What was looked at, ``check`` and ``pick``, in turn."""
    found: list[str] = []

    def counted(name: str, function: Any) -> Any:
        def look(*args: Any, **kwargs: Any) -> Any:
            found.append(name)
            return function(*args, **kwargs)

        return look

    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(dispatch, "_known", {})
    monkeypatch.setattr(checks, "check_norm", counted("check", checks.check_norm))
    monkeypatch.setattr(dispatch, "pick", counted("pick", dispatch.pick))
    yield found


def normed(*shape: int, width: int = 0, device: str = "meta", **options: Any) -> Tensor:
    """A norm of tokens, with a weight of another width if one is given."""
    x = torch.zeros(shape, device=device, **options)
    return kernels.rms_norm(x, torch.ones(width or shape[-1], device=device))[0]


def test_a_call_like_an_earlier_one_is_not_looked_at(looks: list[str]) -> None:
    for _ in range(3):
        assert normed(2, 5, 8).shape == (2, 5, 8)
    assert looks == ["check", "pick"]


def test_any_other_call_is(looks: list[str]) -> None:
    weight = torch.ones(8, device="meta", requires_grad=True)
    others = [
        lambda: normed(2, 5, 8),
        lambda: normed(2, 6, 8),
        lambda: normed(2, 5, 16),
        lambda: normed(2, 5, 8, dtype=torch.bfloat16),
        lambda: normed(2, 5, 8, requires_grad=True),
        lambda: kernels.rms_norm(torch.zeros(5, 2, 8, device="meta").transpose(0, 1), weight),
    ]
    for other in others * 2:
        other()
    with torch.no_grad():
        others[0]()
    assert looks == ["check", "pick"] * (len(others) + 1)


def test_what_is_wrong_is_told_after_what_is_right(looks: list[str]) -> None:
    for _ in range(2):
        normed(2, 5, 8)
        with pytest.raises(ValueError, match=r"^weight has shape \[7\]"):
            normed(2, 5, 8, width=7)
        with pytest.raises(ValueError, match=r"^x has shape \[5, 8\]"):
            normed(5, 8)
        with pytest.raises(ValueError, match=r"^x is torch.int64"):
            normed(2, 5, 8, dtype=torch.int64)
        with pytest.raises(ValueError, match=r"^weight is on cpu"):
            kernels.rms_norm(torch.zeros(2, 5, 8, device="meta"), torch.ones(8))
    assert looks == ["check", "pick"] + ["check"] * 8


def test_an_option_that_is_wrong_is_told_after_one_that_is_right() -> None:
    x = torch.zeros(1, 3, 2, 8, device="meta")
    for _ in range(2):
        kernels.gated_rms_norm(x, None, x, activation="sigmoid")
        with pytest.raises(ValueError, match=r"^activation is 'tanh'"):
            kernels.gated_rms_norm(x, None, x, activation="tanh")


def test_values_on_a_cpu_are_looked_at_every_time() -> None:
    q, log_decay = torch.zeros(1, 3, 2, 8), torch.zeros(1, 3, 2)
    for _ in range(2):
        kernels.diag_decay(q, q, q, log_decay)
        with pytest.raises(ValueError, match=r"^log_decay has positive values"):
            kernels.diag_decay(q, q, q, log_decay + 1)


def test_a_state_on_its_way_is_checked_when_it_arrives() -> None:
    q = torch.zeros(1, 3, 2, 8, device="meta")
    for _ in range(2):
        kernels.diag_decay(q, q, q, state=lambda: torch.zeros(1, 2, 8, 8, device="meta"))
        with pytest.raises(ValueError, match=r"^state has shape \[1, 2, 8, 4\]"):
            kernels.diag_decay(q, q, q, state=lambda: torch.zeros(1, 2, 8, 4, device="meta"))


def test_another_choice_of_backend_holds_at_once(looks: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    normed(2, 5, 8)
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "none")
    with pytest.raises(ValueError, match="names no backend"):
        normed(2, 5, 8)


@pytest.mark.parametrize("passed", [None, True, False])
def test_a_kernel_that_could_not_be_tried_is_tried_later(
    passed: bool | None, looks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fused, in_torch, reference = dispatch.BACKENDS["rms_norm"]
    ran: list[str] = []

    def run(*args: Any, **kwargs: Any) -> Any:
        ran.append("fused")
        return in_torch.run(*args, **kwargs)

    able = dataclasses.replace(fused, run=run, obstacle=in_torch.obstacle)
    monkeypatch.setitem(dispatch.BACKENDS, "rms_norm", (able, in_torch, reference))
    trial = SimpleNamespace(passes=lambda *args: passed)
    monkeypatch.setattr(dispatch.importlib, "import_module", lambda name: trial)
    normed(2, 5, 8)
    normed(2, 5, 8)
    assert looks == ["check", "pick"] * (2 if passed is None else 1)
    assert ran == ([] if passed is False else ["fused"] * 2)


def test_kinds_of_calls_are_not_kept_without_end(looks: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "MOST_KNOWN", 3)
    for tokens in range(1, 10):
        normed(2, tokens, 8)
        assert len(dispatch._known) <= 3
