"""One token of every row against the definitions: every decay, grouped keys, with or without a memory before."""

import pytest
import torch

from linear_moe.kernels import delta_rule, diag_decay, dplr_delta_rule, reference, step

B, G, H, K, V = 3, 2, 4, 5, 6
NAMES = ("diag_decay", "delta_rule", "dplr_delta_rule")


def inputs(name, decay, dtype):
    torch.manual_seed(0)
    shapes = {"head": (H,), "scalar": (B, 1, H), "vector": (B, 1, H, K)}
    found = {"q": (B, 1, G, K), "k": (B, 1, G, K), "v": (B, 1, H, V)}
    found |= {"delta_rule": {"beta": (B, 1, H)}, "dplr_delta_rule": dict.fromkeys("ab", (B, 1, G, K))}.get(
        name, {}
    )
    tensors = {key: torch.randn(shape, dtype=torch.float64).to(dtype) for key, shape in found.items()}
    if decay is not None:
        tensors["log_decay"] = -torch.rand(shapes[decay], dtype=torch.float64).to(dtype)
    return tensors


CASES = [(name, extra) for name in NAMES for extra in ("", "state")]
CASES += [("diag_decay", "columns"), ("diag_decay", "bonus")]


@pytest.mark.parametrize("decay", [None, "head", "scalar", "vector"])
@pytest.mark.parametrize(("name", "extra"), CASES)
def test_one_token_is_the_definition(name, decay, extra):
    given = inputs(name, decay, torch.float64) | {"scale": 0.7}
    if extra:
        given["state"] = torch.randn(B, H, K, V, dtype=torch.float64)
    if extra == "columns":
        given["log_decay_v"] = -torch.rand(B, 1, H, V, dtype=torch.float64)
    if extra == "bonus":
        given["bonus"] = torch.randn(H, K, dtype=torch.float64)
    before = {key: x.clone() for key, x in given.items() if isinstance(x, torch.Tensor)}
    for x, y in zip(step.OPERATIONS[name](**given), getattr(reference, name)(**given), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(given[key], x) for key, x in before.items()), "an argument was changed"


@pytest.mark.parametrize("function", [diag_decay, delta_rule, dplr_delta_rule])
def test_it_runs_for_one_token_without_gradients(function, monkeypatch):
    calls = []
    monkeypatch.delenv("LINEAR_MOE_KERNELS", raising=False)
    monkeypatch.setitem(step.OPERATIONS, function.__name__, lambda *a, **k: calls.append(1) or (None, None))
    given = inputs(function.__name__, "scalar", torch.bfloat16)
    function(**given)
    assert calls == [1]
    function(**{key: torch.cat([x, x], 1) for key, x in given.items()})
    function(**(given | {"v": given["v"].clone().requires_grad_()}))
    function(**{key: x[:1] for key, x in given.items()}, cu_seqlens=torch.tensor([0, 1]))
    monkeypatch.setenv("LINEAR_MOE_KERNELS", "chunked")
    function(**given)
    assert calls == [1]


@pytest.mark.parametrize("name", NAMES)
def test_memories_are_float32_in_half_precision(name):
    given = inputs(name, "vector", torch.bfloat16) | {"state": torch.randn(B, H, K, V)}
    o, memory = step.OPERATIONS[name](**given)
    wanted, wanted_memory = getattr(reference, name)(**given)
    assert o.dtype == torch.bfloat16 and memory.dtype == torch.float32
    torch.testing.assert_close(o, wanted, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(memory, wanted_memory, rtol=1e-5, atol=1e-5)
