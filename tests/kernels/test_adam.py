"""Adam's step: torch path and fused kernel (interpreted, emulated) against the papers and torch.optim."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adam_cases import CASES, USUAL, errors, make, run
from run_interpreted import errors_of_picked
from torch import Tensor

from linear_moe import kernels
from linear_moe.kernels import adam, adam_, dispatch, reference
from linear_moe.kernels.triton import trial

ROOT = Path(__file__).parents[2]
EXACT, SINGLE = 1e-12, 2e-6


@pytest.fixture(scope="module")
def fused_errors(request: pytest.FixtureRequest) -> Callable[[str], list[float]]:
    return errors_of_picked(request, "adam_cases")


@pytest.mark.parametrize("name", CASES)
def test_torch_path_is_exact(name: str) -> None:
    assert max(errors(name, adam.adam_, torch.float64)) <= EXACT


@pytest.mark.parametrize("name", CASES)
def test_fused_kernel(name: str, fused_errors: Callable[[str], list[float]]) -> None:
    assert len(fused_errors(name)) == 3 and max(fused_errors(name)) <= SINGLE


@pytest.mark.parametrize("name", CASES)
def test_the_definition_is_that_of_torch(name: str) -> None:
    """Optimizers that do all on their own, on clipped gradients."""
    written, grads, options = make(name, torch.float64)
    param = torch.nn.Parameter(written["param"].clone())
    kind = torch.optim.AdamW if options["decoupled"] else torch.optim.Adam
    settings = {n: options[n] for n in ("lr", "eps", "weight_decay")}
    optimizer = kind([param], betas=(options["beta1"], options["beta2"]), **settings)
    for grad in grads:
        param.grad = grad * options["factor"]
        optimizer.step()
    found = run(reference.adam_, name, torch.float64)
    torch.testing.assert_close(found["param"], param.detach(), rtol=1e-12, atol=1e-12)
    state = optimizer.state[param]
    torch.testing.assert_close(found["exp_avg_sq"], state["exp_avg_sq"], rtol=1e-12, atol=1e-12)


def test_as_compiled_for_a_gpu() -> None:
    """In bfloat16, aligned and not, on the emulator; without spills and with 16 bytes a load where it can be."""
    program = str(Path(__file__).with_name("adam_compiled.py"))
    folders = os.pathsep.join((str(ROOT), str(ROOT / "benchmarks")))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": folders}
    done = subprocess.run(
        [sys.executable, program], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("place", [0, 1], ids=["aligned", "odd"])
def test_on_a_device(dtype: torch.dtype | None, place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for it, and it has the same bits in every run."""
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "triton")
    draw, size = torch.Generator("cuda").manual_seed(1), 2**20 + 3
    normal = lambda: torch.randn(size + place, generator=draw, device="cuda")[place:]  # noqa: E731
    before = {"param": normal(), "grad": normal(), "exp_avg": normal(), "exp_avg_sq": normal().abs_()}
    if dtype is not None:
        before["half"] = normal().to(dtype)
    found, again, true = ({n: x.clone() for n, x in before.items()} for _ in range(3))
    true = {name: x.double() for name, x in true.items()}
    rest = USUAL | {"step": torch.tensor(3.0)}
    adam_(**found, **rest)
    torch.cuda.set_sync_debug_mode("error")
    try:
        adam_(**again, **rest)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    reference.adam_(**true, **rest)
    for name in ("param", "exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(found[name].double(), true[name], rtol=1e-6, atol=1e-6)
    assert all(torch.equal(found[name], again[name]) for name in found)
    assert dtype is None or torch.equal(found["half"], found["param"].to(dtype))


@pytest.mark.gpu
def test_passes_its_trial_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """So it is what runs by default."""
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    for half in (None, torch.float16, torch.bfloat16):
        tensors = [torch.ones(3000, device="cuda") for _ in range(4)]
        copy = None if half is None else torch.ones(3000, device="cuda", dtype=half)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert dispatch.fused("adam_", *tensors, copy, **USUAL, step=torch.tensor(1.0)) is not None


def arguments(**changes: Any) -> dict[str, Any]:
    tensors: dict[str, Tensor] = {name: torch.zeros(5) for name in ("param", "grad", "exp_avg", "exp_avg_sq")}
    return tensors | {"half": torch.zeros(5).half(), "step": torch.tensor(1.0)} | USUAL | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(grad=torch.zeros(6)), r"grad has shape \[6\]\n  why: grad is param's shape"),
        (dict(grad=torch.zeros(5).half()), r"grad is torch.float16 but param is torch.float32\n  why: "),
        (dict(exp_avg=torch.zeros(5).long()), r"exp_avg is torch.int64"),
        (dict(half=torch.zeros(4).half()), r"half has shape \[4\]"),
        (dict(step=torch.ones(1)), r"step has shape \[1\] on cpu\n  why: .*\n  try: torch.tensor"),
    ],
)
def test_refuses_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adam_(**arguments(**changes))


def test_what_the_kernel_covers(monkeypatch: pytest.MonkeyPatch) -> None:
    takes = dispatch.BACKENDS["adam_"][0].takes
    transposed = torch.zeros(5, 5).t()
    assert takes(**arguments()) and takes(**arguments(half=None))
    assert takes(**arguments(half=torch.zeros(5).bfloat16()))
    assert not takes(**arguments(half=torch.zeros(5)))
    assert not takes(**arguments(grad=torch.zeros(5).double()))
    assert not takes(**arguments(grad=torch.zeros(10)[::2]))
    assert not takes(**arguments(param=transposed, grad=transposed))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not takes(**arguments(half=torch.zeros(5).bfloat16())), "which it computes wrongly"


def pretend(monkeypatch: pytest.MonkeyPatch, run: Callable[..., None]) -> None:
    """A fused kernel for the CPU."""
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(trial, "_passed", {})
    fused, in_torch, definition = dispatch.BACKENDS["adam_"]
    fused = dataclasses.replace(fused, run=run, obstacle=in_torch.obstacle)
    monkeypatch.setitem(dispatch.BACKENDS, "adam_", (fused, in_torch, definition))


def test_a_right_kernel_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []

    def right(param: Tensor, *args: Any, **kwargs: Any) -> None:
        ran.append(len(param))
        adam.adam_(param, *args, **kwargs)

    pretend(monkeypatch, right)
    large = {name: torch.zeros(9000) for name in ("param", "grad", "exp_avg", "exp_avg_sq")}
    for changes in ({}, dict(lr=0.2, step=torch.tensor(7.0)), dict(factor=1.0)):
        adam_(**arguments(**large, half=None, **changes))
    assert ran == [trial.NUM_ELEMENTS, 9000, 9000, 9000]
    adam_(**arguments(decoupled=False))
    assert ran[4:] == [5, 5], "another kind"


WRONG = {
    "no weight decay": lambda options: options | dict(weight_decay=0.0),
    "not clipped": lambda options: options | dict(factor=1.0),
    "the other decay": lambda options: options | dict(decoupled=not options["decoupled"]),
    "another step": lambda options: options | dict(step=options["step"] + 1),
    "betas exchanged": lambda options: options | dict(beta1=options["beta2"], beta2=options["beta1"]),
}


@pytest.mark.parametrize("name", [*WRONG, "stale copy", "last element"])
@pytest.mark.parametrize("decoupled", [False, True])
def test_a_wrong_kernel_is_not_used(name: str, decoupled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*tensors: Tensor, **options: Any) -> None:
        if name == "stale copy":
            tensors = tensors[:4]
        elif name == "last element":
            tensors = tuple(x[:-1] for x in tensors)
        adam.adam_(*tensors, **WRONG.get(name, dict)(options))

    pretend(monkeypatch, wrong)
    given = arguments(decoupled=decoupled, lr=1e-4, factor=0.99)  # hardly anything is to be seen at this rate
    tensors = [given.pop(n) for n in ("param", "grad", "exp_avg", "exp_avg_sq", "half")]
    with pytest.warns(UserWarning, match="^the fused kernel of adam_ is not used: .* differs from float64"):
        assert dispatch.fused("adam_", *tensors, **given) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.fused("adam_", *tensors, **given) is None
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "chunked")
    assert dispatch.fused("adam_", *tensors, **given) is None
    assert "adam_" in kernels.__all__
