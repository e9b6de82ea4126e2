"""The public functions: what they refuse, and which backend they run."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scan_cases import make

from linear_moe import kernels
from linear_moe.kernels import dispatch

CPU = torch.device("cpu")
zeros = torch.zeros


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(q=zeros(2, 8, 4, 6)),
            r"q has shape \[2, 8, 4, 6\]\n  why: q is \[B, T, Hqk, K\], as k\n  try: a tensor \[2, 8, 2, 6\]",
        ),
        (dict(q=zeros(2, 8, 2, 6).double()), "q is torch.float64 but v is torch.float32"),
        (dict(q=zeros(2, 8, 2, 6, device="meta")), "q is on meta"),
        (dict(k=zeros(2, 8, 2, 6).double()), "k is torch.float64 but v is torch.float32"),
        (dict(k=zeros(2, 8, 2, 6).int()), r"k is torch.int32\n  why: .*\n  try: a floating-point tensor"),
        (
            dict(k=zeros(2, 8, 12)),
            r"k has shape \[2, 8, 12\]\n  why: k is \[B, T, Hqk, K\]\n  try: a non-empty",
        ),
        (dict(k=zeros(2, 7, 2, 6)), "k and v of the same B and T"),
        (dict(k=zeros(2, 8, 3, 6)), "k has 3 heads and v has 4"),
        (dict(k=zeros(2, 8, 2, 257)), r"k has head dim 257\n  why: .*\n  try: more heads, of at most 256"),
        (dict(v=zeros(2, 8, 4, 300)), "v has head dim 300"),
        (dict(v=zeros(2, 0, 4, 5)), "v has shape"),
        (dict(log_decay=zeros(2, 8, 4, 5)), r"log_decay has shape .*\n.*\n.* or \[2, 8, 4, 6\]"),
        (dict(log_decay=zeros(4).long()), "log_decay is torch.int64"),
        (dict(log_decay=zeros(4, device="meta")), "log_decay is on meta"),
        (dict(log_decay_v=zeros(2, 8, 4, 5).int()), "log_decay_v is torch.int32"),
        (dict(log_decay_v=zeros(2, 8, 4, 6)), r"log_decay_v .*\n.*\n  try: a tensor \[2, 8, 4, 5\]"),
        (dict(bonus=zeros(4, 5)), r"bonus .*\n.* \[H, K\]\n.* \[4, 6\]"),
        (dict(bonus=zeros(4, 6).int()), "bonus is torch.int32"),
        (dict(bonus=zeros(4, 6), log_decay_v=zeros(2, 8, 4, 5)), "bonus is given together with log_decay_v"),
        (dict(state=zeros(1, 4, 6, 5)), r"state .*\n.* \[N, H, K, V\]\n.* \[2, 4, 6, 5\]"),
        (dict(state=zeros(2, 4, 6, 5).long()), "state is torch.int64"),
        (dict(state=zeros(2, 4, 6, 5, device="meta")), "state is on meta"),
        (dict(cu_seqlens=torch.tensor([0, 8], device="meta")), "cu_seqlens is on meta"),
        (dict(cu_seqlens=torch.tensor([0, 8])), "cu_seqlens is given with B = 2"),
        (dict(cu_seqlens=torch.tensor([0.0, 8.0])), "cu_seqlens is torch.float32"),
        (dict(cu_seqlens=torch.tensor([0])), r"cu_seqlens is torch.int64 of shape \[1\]"),
    ],
)
def test_diag_decay_refuses(changes: dict[str, Any], message: str) -> None:
    inputs = make("diag_decay", num_tokens=8).to(torch.float32)
    with pytest.raises(ValueError, match=message):
        inputs.run(kernels, **changes)


@pytest.mark.parametrize("bounds", [[1, 8], [0, 9], [0, 5, 4, 8]])
def test_wrong_documents_are_refused(bounds: list[int]) -> None:
    inputs = make("delta_rule", num_tokens=8, batch=1, has_state=False)
    with pytest.raises(ValueError, match="non-decreasing offsets from 0 to at most T = 8"):
        inputs.run(kernels, cu_seqlens=torch.tensor(bounds))


@pytest.mark.parametrize("op", ["diag_decay", "delta_rule", "dplr_delta_rule"])
@pytest.mark.parametrize("decay", ["head", "scalar", "vector"])
def test_a_decay_that_grows_is_refused(op: str, decay: str) -> None:
    inputs = make(op, decay, num_tokens=8)
    log_decay = inputs.tensors["log_decay"]
    inputs.run(kernels, log_decay=(log_decay * 0 + 1e-6).requires_grad_())  # a step of a numerical gradient
    log_decay.view(-1)[-1] = 0.25
    with pytest.raises(
        ValueError, match=r"^log_decay has positive values, up to 0.25\n  why: .*\n  try: -log_decay"
    ):
        inputs.run(kernels)
    with pytest.raises(ValueError, match=r"^log_decay has positive"):
        inputs.segment(kernels)


def test_so_is_one_of_columns() -> None:
    inputs = make("diag_decay", "none", extra="log_decay_v", num_tokens=8)
    with pytest.raises(ValueError, match=r"^log_decay_v has positive values"):
        inputs.run(kernels, log_decay_v=-inputs.tensors["log_decay_v"])


def test_delta_rule_and_segments_refuse() -> None:
    inputs = make("delta_rule", num_tokens=8)
    k, v, beta = (inputs.tensors[name] for name in ("k", "v", "beta"))
    with pytest.raises(
        ValueError,
        match=r"beta has shape \[2, 8, 3\]\n  why: beta is \[B, T, H\]\n  try: a tensor \[2, 8, 4\]",
    ):
        inputs.run(kernels, beta=beta[..., :3])
    with pytest.raises(ValueError, match=r"beta is torch.int64"):
        inputs.run(kernels, beta=beta.long())
    with pytest.raises(ValueError, match="beta"):
        kernels.delta_rule_segment(k, v, beta[..., :3])
    with pytest.raises(ValueError, match="log_decay_v"):
        kernels.diag_decay_segment(k, v, log_decay_v=beta)


def test_dplr_and_its_segment_refuse() -> None:
    inputs = make("dplr_delta_rule", num_tokens=8)
    k, v, a, b = (inputs.tensors[name] for name in ("k", "v", "a", "b"))
    with pytest.raises(
        ValueError,
        match=r"a has shape \[2, 8, 2, 5\]\n  why: a is \[B, T, Hqk, K\], as k\n  try: a tensor \[2, 8, 2, 6\]",
    ):
        inputs.run(kernels, a=a[..., :5])
    with pytest.raises(ValueError, match=r"b is torch.int64\n  why: .*\n  try: a floating-point tensor"):
        inputs.run(kernels, b=b.long())
    with pytest.raises(ValueError, match="b has shape"):
        kernels.dplr_delta_rule_segment(k, v, a, b[:, :, :1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(x=zeros(2, 8), weight=zeros(4)), "x has shape"),
        (dict(x=zeros(2, 0, 6)), "x has shape"),
        (dict(x=zeros(2, 8, 6).int()), "x is torch.int32"),
        (dict(weight=zeros(6, 4).int()), "weight is torch.int32"),
        (dict(weight=zeros(6, 0)), r"weight has shape \[6, 0\]"),
        (dict(bias=zeros(6).int()), "bias is torch.int32"),
        (dict(state=zeros(2, 3, 6).int()), "state is torch.int32"),
        (
            dict(weight=zeros(5, 4)),
            r"weight has shape \[5, 4\]\n  why: weight is \[\*C, W\] with C = \[6\], as in x",
        ),
        (dict(bias=zeros(5)), r"bias (.*\n)*.*tensor \[6\]"),
        (dict(activation="gelu"), r"activation is 'gelu'\n  why: .*\n  try: None or \"silu\""),
        (dict(state=zeros(2, 4, 6)), r"state .*\n.*\[N, W - 1, \*C\]\n.* \[2, 3, 6\]"),
        (dict(cu_seqlens=torch.tensor([0, 8])), "cu_seqlens is given with B = 2"),
    ],
)
def test_short_conv_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernels.short_conv(**{"x": zeros(2, 8, 6), "weight": zeros(6, 4), **changes})


def test_backend_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LINEAR_MOE_KERNELS", raising=False)
    assert dispatch.pick("diag_decay", CPU, torch.float32).name == "chunked"
    monkeypatch.setenv("LINEAR_MOE_KERNELS", "reference")
    assert dispatch.pick("delta_rule", CPU, torch.float32).name == "reference"
    inputs = make("delta_rule", "vector", num_tokens=8)
    o, _ = inputs.run(kernels)
    assert torch.equal(o, inputs.run(kernels.reference)[0])
    monkeypatch.setenv("LINEAR_MOE_KERNELS", "cuda")
    with pytest.raises(
        ValueError, match=r"LINEAR_MOE_KERNELS=cuda .*\n  why: the backends are chunked, reference.*\n  try: "
    ):
        inputs.run(kernels)


def test_every_backend_has_its_name() -> None:
    assert {backend.name for table in dispatch.BACKENDS.values() for backend in table} == {*dispatch.NAMES}


def test_a_gpu_without_a_fused_kernel_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LINEAR_MOE_KERNELS", raising=False)
    dispatch._warn_of_torch_once.cache_clear()
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))

    def notices(op: str, device: torch.device) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            dispatch.warn_if_unfused(op, dispatch.pick(op, device, torch.bfloat16), device, torch.bfloat16)
        return [str(warning.message) for warning in caught]

    try:
        assert not notices("dplr_delta_rule", CPU)
        (message,) = notices("dplr_delta_rule", cuda)
        assert message.startswith(
            "dplr_delta_rule has no fused kernel here (fused kernels need compute capability 8.0)"
        )
        assert "slower" in message
        assert not notices("dplr_delta_rule", cuda)
        assert len(notices("delta_rule", cuda)) == 1
        monkeypatch.setenv("LINEAR_MOE_KERNELS", "chunked")
        assert not notices("diag_decay", cuda)
        monkeypatch.setenv("LINEAR_MOE_KERNELS", "triton")
        assert len(notices("diag_decay", CPU)) == 1, "asked for what a CPU has not"
    finally:
        dispatch._warn_of_torch_once.cache_clear()


def test_a_call_says_so_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINEAR_MOE_KERNELS", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dispatch._warn_of_torch_once.cache_clear()
    try:
        with pytest.warns(UserWarning, match="^diag_decay has no fused kernel"):
            make("diag_decay", num_tokens=8).run(kernels)
    finally:
        dispatch._warn_of_torch_once.cache_clear()


def test_scans_are_not_fused_where_triton_miscompiles_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for capability, scans in (
        ((9, 0), "triton"),
        ((10, 0), "chunked"),
        ((10, 3), "chunked"),
        ((12, 0), "triton"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        picked = {
            op: dispatch.pick(op, torch.device("cuda"), torch.bfloat16).name for op in dispatch.BACKENDS
        }
        expected = {op: scans if op.startswith(("diag", "delta", "dplr")) else "triton" for op in picked}
        assert picked == expected


@pytest.mark.parametrize(
    ("kind", "dtype", "capability", "interpreted", "picked"),
    [
        ("cuda", torch.bfloat16, (8, 0), False, "triton"),
        ("cuda", torch.float32, (8, 6), False, "triton"),
        ("cuda", torch.bfloat16, (7, 5), False, "chunked"),
        ("cuda", torch.float64, (9, 0), False, "chunked"),
        ("cuda", torch.float32, (9, 0), True, "chunked"),
        ("cpu", torch.float32, None, False, "chunked"),
        ("cpu", torch.float32, None, True, "triton"),
        ("cpu", torch.float16, None, True, "triton"),
        ("cpu", torch.bfloat16, None, True, "chunked"),
        ("cpu", torch.float64, None, True, "chunked"),
    ],
)
def test_where_fused_kernels_run(
    kind: str,
    dtype: torch.dtype,
    capability: tuple[int, int] | None,
    interpreted: bool,
    picked: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "triton")
    monkeypatch.setenv("TRITON_INTERPRET", str(int(interpreted)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for op in ("weighted_swiglu", "diag_decay"):
        assert dispatch.pick(op, torch.device(kind), dtype).name == picked
        with monkeypatch.context() as without:
            without.setattr(dispatch, "_has_triton", lambda: False)
            assert dispatch.pick(op, torch.device(kind), dtype).name == "chunked", "Triton is not installed"


def test_fused_kernels_run_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the current one, where Triton would launch them."""
    devices: list[Any] = []

    @contextmanager
    def device_of(x: torch.Tensor) -> Iterator[None]:
        devices.append(x)
        yield
        devices.pop()

    def run(x: torch.Tensor, *others: Any) -> bool:
        return devices == [x]

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(weighted_swiglu=run))
    fused = next(b for b in dispatch.BACKENDS["weighted_swiglu"] if b.name == "triton")
    assert fused.run(torch.zeros(2, 4), torch.zeros(2))


def test_every_public_operation_has_a_backend() -> None:
    assert set(dispatch.BACKENDS) == set(kernels.__all__) - {"Segment"}


def test_an_exported_folder_says_where_its_fused_kernels_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINEAR_MOE_KERNELS", "triton")
    table = tuple(backend for backend in dispatch.BACKENDS["delta_rule"] if backend.name != "triton")
    monkeypatch.setitem(dispatch.BACKENDS, "delta_rule", table)
    dispatch._warn_of_torch_once.cache_clear()
    try:
        with pytest.warns(
            UserWarning, match=r"^delta_rule .* here \(it comes with the package linear_moe\), "
        ):
            dispatch.warn_if_unfused("delta_rule", table[0], CPU, torch.float32)
    finally:
        dispatch._warn_of_torch_once.cache_clear()
