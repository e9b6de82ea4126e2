"""The short convolution against its token loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scan_cases import error, gradients, poison_empty
from torch import Tensor

from linear_moe import kernels
from linear_moe.kernels import conv, reference, short_conv

EXACT = 1e-10
PACKED = (0, 0, 1, 3, 3, 20, 22, 40, 40)
WIDTHS = (5, 70, 3, 2, 4)
"""Of the projections in one fused tensor, three of them convolved."""


@pytest.fixture(autouse=True)
def nan_in_fresh_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_empty(monkeypatch)


def make(
    num_tokens: int = 40,
    channels: tuple[int, ...] = (3, 2),
    width: int = 4,
    cu_seqlens: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(num_tokens + width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    batch = 2 if cu_seqlens is None else 1
    num_documents = batch if cu_seqlens is None else len(cu_seqlens) - 1
    inputs: dict[str, Any] = dict(
        x=normal(batch, num_tokens, *channels),
        weight=normal(*channels, width),
        bias=normal(*channels),
        state=normal(num_documents, width - 1, *channels),
    )
    if cu_seqlens is not None:
        inputs["cu_seqlens"] = torch.tensor(cu_seqlens)
    return inputs


def make_wide(**sizes: Any) -> dict[str, Any]:
    """Of a fused projection, whose last channels are not convolved."""
    inputs, channels = make(channels=(2, sum(WIDTHS)), **sizes), sum(WIDTHS[:3])
    inputs["weight"] = inputs["weight"].detach()[:, :channels].clone().requires_grad_()
    for name in ("bias", "state"):
        inputs[name] = inputs[name].detach()[..., :channels].clone().requires_grad_()
    return inputs


def results(
    function: Any,
    inputs: dict[str, Any],
    activation: str | None,
    used: tuple[int, ...] | None = None,
    **options: Any,
) -> list[Tensor]:
    """Outputs, those ``used`` or all, and gradients."""
    outputs = list(function(**inputs, activation=activation, **options))
    outputs = outputs if used is None else [outputs[n] for n in used]
    leaves = {name: x for name, x in inputs.items() if name != "cu_seqlens" and x is not None}
    return [*outputs, *gradients(outputs, leaves).values()]


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("cu_seqlens", [None, PACKED, (0, 17)])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_equals_token_loop(activation: str | None, cu_seqlens: tuple[int, ...] | None, width: int) -> None:
    inputs = make(width=width, cu_seqlens=cu_seqlens)
    found = results(short_conv, inputs, activation)
    truth = results(reference.short_conv, inputs, activation)
    assert all(error(f, t) <= EXACT for f, t in zip(found, truth))


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 5])
def test_runs_shorter_than_the_window(num_tokens: int) -> None:
    inputs = make(num_tokens, channels=(5,))
    found, truth = (results(f, inputs, "silu") for f in (short_conv, reference.short_conv))
    assert all(error(f, t) <= EXACT for f, t in zip(found, truth))


@pytest.mark.parametrize("cu_seqlens", [None, PACKED])
def test_parts_of_a_fused_projection(cu_seqlens: tuple[int, ...] | None) -> None:
    inputs = make_wide(cu_seqlens=cu_seqlens)
    found, truth = (
        results(module.conv_and_split, inputs, "silu", widths=WIDTHS) for module in (kernels, reference)
    )
    assert [tuple(part.shape[2:]) for part in found[:5]] == [(2, width) for width in WIDTHS]
    assert all(error(f, t) <= EXACT for f, t in zip(found, truth, strict=True))
    with torch.no_grad():
        without = kernels.conv_and_split(**inputs, activation="silu", widths=WIDTHS)
    assert all(error(f, t) <= EXACT for f, t in zip(without, truth[:6], strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.zeros(1, 5, 4)), r"x has shape \[1, 5, 4\]"),
        (dict(weight=torch.zeros(2, 5, 4)), r"weight has shape \[2, 5, 4\]"),
        (dict(widths=(2, 2)), r"widths is \(2, 2\)"),
        (dict(widths=(3, 2)), r"widths is \(3, 2\)"),
    ],
)
def test_refuses_parts_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    right: dict[str, Any] = dict(x=torch.zeros(1, 5, 2, 4), weight=torch.zeros(2, 3, 4), widths=(3, 1))
    with pytest.raises(ValueError, match=message):
        kernels.conv_and_split(**{**right, **change})


def test_defaults_are_no_bias_and_zero_history() -> None:
    inputs = make()
    inputs["bias"] = inputs["state"] = None
    (y, window), (truth, truth_window) = short_conv(**inputs), reference.short_conv(**inputs)
    assert error(y, truth) <= EXACT and torch.equal(window, truth_window)


@pytest.mark.parametrize("cu_seqlens", [None, PACKED])
def test_results_have_the_dtype_of_the_inputs(cu_seqlens: tuple[int, ...] | None) -> None:
    """A tail that was kept in float32 too."""
    inputs = make(cu_seqlens=cu_seqlens)
    low = {name: inputs[name].detach().to(torch.bfloat16) for name in ("x", "weight", "bias")}
    given = inputs | low | {"state": inputs["state"].detach().to(torch.bfloat16).float()}
    y, window = short_conv(**given)
    assert y.dtype == window.dtype == torch.bfloat16
    truth, truth_window = reference.short_conv(**{**given, "state": given["state"].to(torch.bfloat16)})
    assert torch.equal(y, truth) and torch.equal(window, truth_window)


def test_state_continues_a_run() -> None:
    inputs = make()
    y, window = short_conv(**inputs)
    first, state = short_conv(**{**inputs, "x": inputs["x"][:, :2]})
    second, final = short_conv(**{**inputs, "x": inputs["x"][:, 2:], "state": state})
    assert torch.equal(torch.cat([first, second], 1), y) and torch.equal(final, window)


def test_documents_never_see_each_other() -> None:
    inputs = make(cu_seqlens=PACKED)
    y, window = short_conv(**inputs)
    changed = inputs["x"].detach().clone()
    changed[:, 20:22] = float("nan")
    changed_y, changed_window = short_conv(**{**inputs, "x": changed})
    others = [t for t in range(40) if not 20 <= t < 22]
    assert torch.equal(changed_y[:, others], y[:, others])
    assert torch.equal(changed_window[[0, 1, 2, 3, 4, 6, 7]], window[[0, 1, 2, 3, 4, 6, 7]])


def test_bfloat16_rounds_once() -> None:
    inputs = make(dtype=torch.bfloat16)
    y, window = short_conv(**inputs)
    truth, _ = reference.short_conv(**{name: x.double() for name, x in inputs.items()})
    assert y.dtype == window.dtype == torch.bfloat16
    assert torch.equal(y, truth.float().to(torch.bfloat16))


def test_training_keeps_inputs_only() -> None:
    inputs = make(num_tokens=40, cu_seqlens=PACKED)
    x = inputs["x"]
    ours = {x.untyped_storage().data_ptr() for x in inputs.values()}
    large: list[Tensor] = []

    def pack(saved: Tensor) -> Tensor:
        if saved.is_floating_point() and saved.numel() >= x.numel():
            large.append(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        conv.short_conv(**inputs, activation="silu")
    assert large and {saved.untyped_storage().data_ptr() for saved in large} <= ours


def test_runs_where_there_is_no_data() -> None:
    """On the meta device a tensor left on the CPU, or a value that is looked at, is an error: so it is on CUDA."""
    inputs = {name: x.detach().to("meta") for name, x in make(cu_seqlens=PACKED).items()}
    inputs["x"].requires_grad_()
    y, window = short_conv(**inputs, activation="silu")
    (y.sum() + window.sum()).backward()
    assert inputs["x"].grad.shape == y.shape == inputs["x"].shape
