"""Figures are read beside the optimizer: when their stream is in use, what ends that, and that nobody waits."""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from megatron.core.timers import Timer

from linear_moe.training import engine, figures_stream
from linear_moe.training.figures_stream import (
    FiguresStream,
    close_after,
    close_before,
    lap,
    open_after_optimizer,
)


class FakeStream:
    """Says what it is told."""

    def __init__(self, name: str, said: list[str]) -> None:
        self.name, self.said = name, said

    def record_event(self) -> str:
        self.said.append(f"{self.name} records")
        return "before the optimizer"

    def wait_event(self, event: str) -> None:
        self.said.append(f"{self.name} waits for what came {event}")

    def wait_stream(self, other: FakeStream) -> None:
        self.said.append(f"{self.name} waits for {other.name}")


class FakeDevice:
    """A GPU's streams, and an optimizer and functions of Megatron that say on which one they run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **args: Any) -> None:
        self.said: list[str] = []
        self.stream = FakeStream("main", self.said)
        monkeypatch.setattr(figures_stream, "_figures", FiguresStream())
        monkeypatch.setattr(figures_stream.cpu, "is_active", lambda: False)
        device = SimpleNamespace(
            is_available=lambda: True,
            Stream=lambda priority: FakeStream("own", self.said),
            current_stream=lambda: self.stream,
            set_stream=lambda stream: setattr(self, "stream", stream),
        )
        monkeypatch.setattr(figures_stream, "torch", SimpleNamespace(cuda=device, Tensor=torch.Tensor))
        megatron = SimpleNamespace(get_args=lambda: SimpleNamespace(**args))
        monkeypatch.setitem(sys.modules, "megatron.training", cast(Any, megatron))
        monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
        self.found: tuple[Any, Any, Any] = (True, 0.5, None)
        self.optimizer = SimpleNamespace(step=lambda: self.does("optimizer", self.found))
        self.train_step = open_after_optimizer(self._train_step)
        self.log = close_after(lambda: self.does("log"))

    def does(self, what: str, result: Any = None) -> Any:
        self.said.append(f"{what} on {self.stream.name}")
        return result

    def _train_step(self, step: Any, data: Any, model: Any, optimizer: Any, last: str) -> Any:
        self.does("forward and backward")
        found = optimizer.step()
        self.does(last)
        if last == "error":
            raise RuntimeError("of the step")
        return found


def test_when_it_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice(monkeypatch)
    stock = device.optimizer.step
    for _ in range(2):
        device.said.clear()
        assert device.train_step(None, None, None, device.optimizer, last="losses") == device.found
        assert device.optimizer.step is stock
        device.log()
        device.does("next step")
        assert device.said == [
            "forward and backward on main",
            "main records",
            "optimizer on main",
            "own waits for what came before the optimizer",
            "losses on own",
            "log on own",
            "main waits for own",
            "next step on main",
        ]


def test_what_ends_it_early(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice(monkeypatch)
    save = close_before(lambda: device.does("save"))
    device.train_step(None, None, None, device.optimizer, last="losses")
    save()
    device.log()
    assert device.said[-4:] == ["losses on own", "main waits for own", "save on main", "log on main"]
    with pytest.raises(RuntimeError, match="of the step"):
        device.train_step(None, None, None, device.optimizer, last="error")
    assert device.stream.name == "main" and device.said[-1] == "main waits for own"


@pytest.mark.parametrize("found", [(True, torch.ones(1), None), (False, None, None)], ids=["norm", "skipped"])
def test_what_the_optimizer_has_not_waited_for(monkeypatch: pytest.MonkeyPatch, found: tuple) -> None:
    """A norm on the device, as with Transformer Engine; a loss scale that has just been lowered."""
    device = FakeDevice(monkeypatch)
    device.found = found
    assert device.train_step(None, None, None, device.optimizer, last="losses") is found
    device.log()
    assert device.said[-3:] == ["optimizer on main", "losses on main", "log on main"]


def test_a_step_whose_log_never_came(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice(monkeypatch)
    for _ in range(2):
        device.train_step(None, None, None, device.optimizer, last="losses")
    assert device.said.count("forward and backward on main") == 2


@pytest.mark.parametrize("reason", ["one queue", "weights", "CPU"])
def test_where_all_is_as_in_megatron(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    device = FakeDevice(monkeypatch, **({"qk_clip": True} if reason == "weights" else {}))
    if reason == "one queue":
        monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if reason == "CPU":
        monkeypatch.setattr(figures_stream.cpu, "is_active", lambda: True)
    device.train_step(None, None, None, device.optimizer, last="losses")
    device.log()
    assert device.said == [
        "forward and backward on main",
        "optimizer on main",
        "losses on main",
        "log on main",
    ]


def functions_of_training(rank: int, world: int) -> list[bool]:
    import megatron.training.training as training

    engine.install()
    names = ["train_step", "training_log", *figures_stream.READ_WEIGHTS]
    return [getattr(training, name).__globals__["__name__"] == figures_stream.__name__ for name in names]


def test_megatron_calls_them(gloo: Any) -> None:
    assert gloo(1, functions_of_training)[0] == [True] * 4


def test_a_lap_waits_for_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """And laps, pauses included, add up to what the timer counts."""
    waits: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append("synchronize"))
    timer, begin = Timer("interval-time"), time.time()
    timer.start()
    waits.clear()
    time.sleep(0.02)
    first, second = lap(timer), lap(timer)
    assert not waits and 0.02 <= first < time.time() - begin and 0 <= second < 0.02
    time.sleep(0.01)
    timer.stop()
    time.sleep(0.05)  # an evaluation
    timer.start()
    third = lap(timer)
    assert 0.01 <= third < 0.05
    timer.stop()
    assert timer.active_time() == pytest.approx(first + second + third + timer.elapsed(), abs=1e-6)


@pytest.mark.gpu
def test_figures_are_there_before_the_optimizer_is_done() -> None:
    figures, done = FiguresStream(), torch.cuda.Event()
    loads = torch.ones(8, device="cuda")
    (loads * 2).sum().item()  # compiled and loaded
    loads += 1
    ready = torch.cuda.current_stream().record_event()
    for _ in range(20):
        torch.cuda._sleep(20_000_000)  # 10 ms
    done.record()
    figures.open(ready)
    try:
        assert (loads * 2).sum().item() == 32 and not done.query()
        loads.zero_()
    finally:
        figures.close()
    after = loads + 1
    assert not done.query(), "the host did not wait"
    assert after.sum().item() == 8
