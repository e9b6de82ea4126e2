"""The chunked scans against the token loops, forward and every gradient."""

from __future__ import annotations

import pytest
import torch
from scan_cases import DECAYS, OPS, PACKED, Chunked, Inputs, check, error, make, poison_empty, results
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from linear_moe import kernels
from linear_moe.kernels import chunks, reference

EXACT, SINGLE = 1e-10, 1e-5
VARIANTS = [
    *[("diag_decay", decay, extra) for decay in DECAYS for extra in ("", "log_decay_v", "bonus")],
    *[(op, decay, "") for op in ("delta_rule", "dplr_delta_rule") for decay in DECAYS],
]


@pytest.fixture(autouse=True)
def nan_in_fresh_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_empty(monkeypatch)


@pytest.mark.parametrize(("op", "decay", "extra"), VARIANTS)
@pytest.mark.parametrize("layout", ["rows", "packed"])
def test_equals_token_loop(op: str, decay: str, extra: str, layout: str) -> None:
    packed = dict(cu_seqlens=PACKED, num_tokens=PACKED[-1]) if layout == "packed" else {}
    check(make(op, decay, extra=extra, **packed), EXACT)


@pytest.mark.parametrize("num_tokens", [1, 5, 64, 257])
@pytest.mark.parametrize(
    ("op", "decay"),
    [
        ("diag_decay", "scalar"),
        ("diag_decay", "vector"),
        ("delta_rule", "vector"),
        ("dplr_delta_rule", "scalar"),
        ("dplr_delta_rule", "vector"),
    ],
)
def test_any_length(op: str, decay: str, num_tokens: int) -> None:
    check(make(op, decay, num_tokens=num_tokens, batch=1 + num_tokens % 2), EXACT)
    check(make(op, decay, num_tokens=num_tokens, cu_seqlens=(0, num_tokens)), EXACT)


@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_any_chunk_size(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "preferred_chunk_size", lambda device, num_keys: size)
    for op in OPS:
        check(make(op, "vector", num_tokens=PACKED[-1], cu_seqlens=PACKED), EXACT)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("groups", "num_keys", "num_values"), [(1, 9, 3), (4, 3, 17), (2, 1, 1)])
def test_head_groups_and_dims(op: str, groups: int, num_keys: int, num_values: int) -> None:
    sizes = dict(num_tokens=70, groups=groups, num_keys=num_keys, num_values=num_values, has_state=False)
    for decay in ("none", "scalar", "vector"):
        check(make(op, decay, **sizes), EXACT)


@pytest.mark.parametrize(("op", "decay", "extra"), VARIANTS)
@pytest.mark.parametrize("strength", [0.01, 2.0, 60.0])
def test_float32(op: str, decay: str, extra: str, strength: float) -> None:
    check(make(op, decay, extra=extra, strength=strength, num_keys=16), SINGLE, dtype=torch.float32)


@pytest.mark.parametrize(
    ("op", "extra"),
    [("diag_decay", ""), ("diag_decay", "log_decay_v"), ("delta_rule", ""), ("dplr_delta_rule", "")],
)
@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_sudden_and_total_forgetting(op: str, extra: str, decay: str) -> None:
    """Weak decay after strong: a difference of running sums would have lost it to cancellation."""
    inputs = make(op, decay, extra=extra, num_tokens=140, strength=0.01)
    for name in inputs.tensors.keys() & {"log_decay", "log_decay_v"}:
        inputs.tensors[name][:, 10:60:2] = -30.0
        inputs.tensors[name][:, 70:90] = -200.0
    check(inputs, EXACT)
    check(inputs, SINGLE, dtype=torch.float32)
    for name in inputs.tensors.keys() & {"log_decay", "log_decay_v"}:
        inputs.tensors[name][:, 17:130:29] = float("-inf")
    check(inputs, EXACT)


def test_delta_rule_with_adversarial_gates() -> None:
    inputs = make("delta_rule", "scalar", num_tokens=130, strength=0.0)
    inputs.tensors["k"] = inputs.tensors["k"][:, :1].expand(-1, 130, -1, -1)
    beta = inputs.tensors["beta"]
    for value in (0.0, 1.0, 2.0):
        inputs.tensors["beta"] = torch.full_like(beta, value)
        check(inputs, EXACT)
        # repeated reflections cancel in any chunked form: one digit less, substitution instead of the inverse or not
        check(inputs, SINGLE if value < 2.0 else 3 * SINGLE, dtype=torch.float32)
    inputs.tensors["beta"] = beta.round()
    inputs.tensors["log_decay"] = torch.full_like(beta, -30.0)
    check(inputs, EXACT)


@pytest.mark.parametrize("decay", ["none", "scalar", "vector"])
def test_dplr_with_adversarial_gates(decay: str) -> None:
    """One direction removed from every token on: not at all, wholly, and turned round; then by chance."""
    inputs = make("dplr_delta_rule", decay, num_tokens=130, strength=0.0)
    removed = -inputs.tensors["a"][:, :1].expand(-1, 130, -1, -1)
    inputs.tensors["a"] = -removed
    for strength in (0.0, 1.0, 2.0):
        inputs.tensors["b"] = strength * removed
        check(inputs, EXACT)
        check(inputs, SINGLE if strength < 2.0 else 3 * SINGLE, dtype=torch.float32)
    generator = torch.Generator().manual_seed(2)
    inputs.tensors["b"] = removed * torch.randint(0, 2, removed.shape, generator=generator)
    if decay != "none":
        inputs.tensors["log_decay"] = torch.full_like(inputs.tensors["log_decay"], -30.0)
    check(inputs, EXACT)


@pytest.mark.parametrize("layout", ["rows", "packed"])
def test_dplr_with_unrelated_factors(layout: str) -> None:
    """``a`` and ``b`` of any sign and direction, which no mixer's parametrisation ties together."""
    packed = dict(cu_seqlens=PACKED) if layout == "packed" else {}
    inputs = make("dplr_delta_rule", "vector", num_tokens=PACKED[-1], **packed)
    generator = torch.Generator().manual_seed(3)
    for name in ("a", "b"):
        like = inputs.tensors[name]
        inputs.tensors[name] = 0.4 * torch.randn(like.shape, generator=generator, dtype=like.dtype)
    check(inputs, EXACT)
    inputs.tensors["log_decay"] *= 30.0
    check(inputs, EXACT)


def test_dplr_contains_the_delta_rule() -> None:
    """With ``a = -decayed k``, ``b = beta k`` and ``beta k v^T`` written, both definitions are one."""
    inputs = make("delta_rule", "vector", groups=4, num_tokens=100)
    truth, truth_state = inputs.run(reference)
    x = inputs.tensors
    b = x["beta"][..., None] * x["k"]
    a = -x["k"] * x["log_decay"].exp()
    tensors = {"q": x["q"], "k": b, "v": x["v"], "a": a, "b": x["k"] * x["beta"][..., None]}
    tensors |= {"log_decay": x["log_decay"], "state": x["state"]}
    o, state = Inputs("dplr_delta_rule", tensors).run(Chunked)
    assert error(o, truth) <= EXACT and error(state, truth_state) <= EXACT


@pytest.mark.parametrize(("op", "decay", "extra"), [*VARIANTS[-8:], ("diag_decay", "vector", "bonus")])
def test_bfloat16_inputs(op: str, decay: str, extra: str) -> None:
    """Results round once, at the end; nothing inside is bfloat16, so nothing else is lost."""
    given = make(op, decay, extra=extra, num_tokens=130, num_keys=16).to(torch.bfloat16)
    truth = results(given.to(torch.float64), reference, torch.bfloat16)
    found = results(given, Chunked, torch.bfloat16)
    assert found["o"].dtype == torch.bfloat16
    assert found["state_out"].dtype == torch.float32
    assert error(found["state_out"], truth["state_out"]) <= SINGLE
    for name, value in truth.items():
        assert error(found[name], value) <= 2**-8 + SINGLE, name  # half of the last of 8 bits


@pytest.mark.parametrize(("op", "gates"), [("delta_rule", ("beta",)), ("dplr_delta_rule", ("a",))])
def test_mixed_dtypes_keep_float32_decays_and_states(op: str, gates: tuple[str, ...]) -> None:
    given = make(op, "vector", strength=1e-3, num_tokens=200).to(torch.float32)
    low = {name: given.tensors[name].to(torch.bfloat16) for name in ("q", "k", "v", *gates)}
    given.tensors.update(low)
    found = results(given, Chunked)
    assert found["grad log_decay"].dtype == found["grad state"].dtype == torch.float32
    assert found["grad q"].dtype == torch.bfloat16
    truth = results(given.to(torch.float64), reference)
    assert error(found["state_out"], truth["state_out"]) <= SINGLE


@pytest.mark.parametrize("op", OPS)
def test_strided_inputs(op: str) -> None:
    """q, k, v (and a, b) as slices of one fused projection in Megatron's [T, B, ...] order."""
    inputs = make(op, "scalar", groups=4, num_values=6)
    names = [name for name in ("q", "k", "v", "a", "b") if name in inputs.tensors]
    fused_TBHP = torch.cat([inputs.tensors[name] for name in names], -1).transpose(0, 1).contiguous()
    for name, x_TBHD in zip(names, fused_TBHP.split(6, -1)):
        inputs.tensors[name] = x_TBHD.transpose(0, 1)
        assert not inputs.tensors[name].is_contiguous()
    check(inputs, EXACT)


@pytest.mark.parametrize("op", OPS)
def test_documents_never_see_each_other(op: str) -> None:
    inputs = make(op, "vector", num_tokens=200, cu_seqlens=PACKED)
    o, state = inputs.run(Chunked)
    for name in ("q", "k", "v", "log_decay"):
        inputs.tensors[name][:, 72:137] *= 3.0
    changed_o, changed_state = inputs.run(Chunked)
    others = [t for t in range(200) if not 72 <= t < 137]
    assert torch.equal(o[:, others], changed_o[:, others])
    assert torch.equal(state[:6], changed_state[:6]) and torch.equal(state[7:], changed_state[7:])


@pytest.mark.parametrize("op", OPS)
def test_tokens_after_the_last_document_read_zero(op: str) -> None:
    inputs = make(op, "vector", num_tokens=200, cu_seqlens=(0, 64, 64, 150))
    check(inputs, EXACT)
    assert (inputs.run(Chunked)[0][:, 150:] == 0).all()
    # As many chunks as this number of tokens and documents can need, so that only one more is free.
    check(make(op, "vector", num_tokens=34, cu_seqlens=(0, 33)), EXACT)
    check(make(op, "vector", num_tokens=7, cu_seqlens=(0, 1, 2, 3, 4, 5)), EXACT)
    no_documents = make(op, "vector", num_tokens=20, cu_seqlens=(0, 0, 0))
    o, state = no_documents.run(Chunked)
    assert (o == 0).all() and torch.equal(state, no_documents.tensors["state"])


@pytest.mark.parametrize("op", OPS)
def test_gradient_through_one_result_only(op: str) -> None:
    inputs = make(op, "vector").differentiable()
    leaves = {name: x for name, x in inputs.tensors.items() if name not in ("q", "state")}
    for index in (0, 1):
        grads = [
            torch.autograd.grad(inputs.run(module)[index].square().sum(), list(leaves.values()))
            for module in (Chunked, reference)
        ]
        assert all(error(found, truth) <= EXACT for found, truth in zip(*grads))


@pytest.mark.parametrize(
    ("op", "decay", "extra"),
    [("diag_decay", "head", "bonus"), ("delta_rule", "vector", ""), ("dplr_delta_rule", "vector", "")],
)
def test_training_keeps_inputs_only(op: str, decay: str, extra: str) -> None:
    inputs = make(op, decay, extra=extra, num_tokens=257).differentiable()
    ours = {x.untyped_storage().data_ptr() for x in inputs.tensors.values()}
    saved: list[int] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x.untyped_storage().data_ptr())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        inputs.run(Chunked)
    assert saved and set(saved) <= ours


@pytest.mark.parametrize("num_tokens", [70, 1])
@pytest.mark.parametrize("op", OPS)
def test_autocast_changes_nothing(op: str, num_tokens: int) -> None:
    """Nor in training, where segments are composed, nor in decoding: one token without gradients."""
    inputs = make(op, "scalar", num_tokens=num_tokens).to(torch.float32).differentiable()

    def found() -> list[torch.Tensor]:
        with torch.set_grad_enabled(num_tokens > 1):
            o, state = inputs.run(kernels)
            segment = inputs.segment(kernels)
            both = segment.then(segment)
        results = [o, state, both.state, both.carry(state)] + ([] if both.decay is None else [both.decay])
        if num_tokens == 1:
            return results
        tensors = [x for x in inputs.tensors.values() if x.requires_grad]
        return results + list(torch.autograd.grad(sum(x.sum() for x in results), tensors))

    expected = found()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for ours, theirs in zip(found(), expected, strict=True):
            assert torch.equal(ours, theirs)


class _RefuseToWait(TorchDispatchMode):
    """Fails on operations whose result or shape the host must wait for."""

    waiting = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "repeat_interleave")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert not any(name in str(func) for name in self.waiting), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", OPS)
def test_packed_documents_need_no_host_synchronisation(op: str) -> None:
    inputs = make(op, "vector", num_tokens=200, cu_seqlens=PACKED).differentiable()
    with _RefuseToWait():
        o, state = inputs.run(Chunked)
        (o.sum() + state.sum()).backward()
        inputs.segment(Chunked)
    with pytest.raises(AssertionError, match="waits"), _RefuseToWait():
        inputs.tensors["cu_seqlens"].max().item()


@pytest.mark.parametrize(("op", "decay", "extra"), VARIANTS)
def test_runs_where_there_is_no_data(op: str, decay: str, extra: str) -> None:
    """On the meta device a tensor left on the CPU, or a value that is looked at, is an error: so it is on CUDA."""
    inputs = make(op, decay, extra=extra, num_tokens=200, cu_seqlens=PACKED)
    inputs.tensors = {name: x.to("meta") for name, x in inputs.tensors.items()}
    found = _shapes(inputs)
    assert found == {name: x.shape for name, x in inputs.tensors.items() if name in found}


def _shapes(inputs: Inputs) -> dict[str, torch.Size]:
    inputs = inputs.differentiable()
    o, state = inputs.run(kernels)
    (o.sum() + state.sum()).backward()
    if "bonus" not in inputs.tensors:
        assert inputs.segment(kernels).state.shape == state.shape
    grads = {name: x.grad.shape for name, x in inputs.tensors.items() if x.grad is not None}
    assert len(grads) == len(inputs.tensors) - 1
    return {**grads, "v": o.shape, "state": state.shape}


@pytest.mark.parametrize("op", ["delta_rule", "dplr_delta_rule"])
def test_token_by_token_equals_the_whole_run(op: str) -> None:
    inputs = make(op, "vector", num_tokens=20)
    o, final = inputs.run(kernels)
    state, outputs = inputs.tensors["state"], []
    for t in range(20):
        token = {name: x[:, t : t + 1] for name, x in inputs.tensors.items() if name != "state"}
        o_t, state = Inputs(op, token).run(kernels, state=state)
        outputs.append(o_t)
    assert error(torch.cat(outputs, 1), o) <= EXACT
    assert error(state, final) <= EXACT
