"""Cases of the fused delta rule, which run_interpreted.py runs in Triton's interpreter."""

from __future__ import annotations

import math
from functools import partial
from unittest import mock

import fused_scans
import pytest
import torch
from fused_scans import (
    FORGET,
    ONE,
    Change,
    after_the_last_document,
    configured,
    decays,
    no_documents,
    one_projection,
    repeated_keys,
    some_gradients,
    through_one_result,
)
from interpreted_cases import Cases, Errors
from scan_cases import PACKED, error, make, results

from linear_moe import kernels
from linear_moe.kernels import reference

OP = "delta_rule"
CASES = Cases()
case, fused = CASES.add, CASES.run
compare = partial(fused_scans.compare, OP)
DECAYS = ("none", "head", "scalar", "vector")


def sudden(tensors: dict[str, torch.Tensor]) -> None:
    tensors["log_decay"][:, 5:30:2] = -30.0
    tensors["log_decay"][:, 35:45] = -200.0


def total(tensors: dict[str, torch.Tensor]) -> None:
    sudden(tensors)
    tensors["log_decay"][:, 7:60:19] = FORGET


def mostly_weak(tensors: dict[str, torch.Tensor]) -> None:
    """What float16's half chunks keep is enough for a border for each, but in the second chunk."""
    tensors["log_decay"][:] *= 0.2
    tensors["log_decay"][:, 70:80, :, 3] = -3.0
    tensors["beta"][:, 90:] = 0.0


def borderline(tensors: dict[str, torch.Tensor]) -> None:
    """All half chunks keep just 2^-8, what weak ones of float16 must; those of 3 chunks in one column just less."""
    tensors["log_decay"][:] = -8 * math.log(2) / 32 * 0.999
    for token, column in ((64, 0), (128 + 32, 5), (192 + 63, 2)):
        tensors["log_decay"][:, token, :, column] *= 1.1
    tensors["log_decay"][:, 256:] = 0.0  # and then all in one token
    tensors["log_decay"][:, 287] = -8 * math.log(2) * 0.999


def betas(value: float) -> Change:
    return lambda tensors: tensors["beta"].fill_(value)


for decay in DECAYS:
    case(f"{decay} rows", decay, num_tokens=50, **({} if decay in ("head", "vector") else ONE))(compare)
    if decay != "none":
        case(f"{decay} strong", decay, num_tokens=40, change=decays(-30.0), **ONE)(compare)
        case(f"{decay} forgets all", decay, num_tokens=40, change=decays(FORGET), **ONE)(compare)
    case(f"{decay} pieces", decay, num_tokens=130, processors=5, **ONE)(compare)
    if decay not in ("none", "head"):
        case(f"{decay} packed", decay, chunk=32, num_tokens=210, cu_seqlens=PACKED, groups=1, num_heads=1)(
            compare
        )
        case(f"{decay} half precision", decay, num_tokens=80, chunk=None, dtype=torch.float16, **ONE)(compare)
        case(f"{decay} repeated keys", decay, num_tokens=70, chunk=64, change=repeated_keys, **ONE)(compare)
        strong = dict(num_tokens=50, strength=0.01, **ONE)
        case(f"{decay} now and then", decay, change=sudden, **strong)(compare)
        case(f"{decay} now and then all", decay, change=total, **strong)(compare)
        case(f"{decay} weak", decay, num_tokens=40, chunk=None, change=decays(-1e-3), **ONE)(compare)
        case(f"{decay} one token", decay, num_tokens=1, has_state=False, **ONE)(compare)
        case(f"{decay} blocks", decay, num_tokens=17, batch=1, num_keys=40, num_values=40, num_heads=2)(
            compare
        )
        case(f"{decay} nothing written", decay, num_tokens=20, change=betas(0.0), **ONE)(compare)
weak = dict(chunk=None, dtype=torch.float16, change=mostly_weak, **ONE)
case("weak half precision", "vector", num_tokens=200, num_keys=32, num_values=16, processors=0, **weak)(
    compare
)
several = dict(num_tokens=200, cu_seqlens=(0, 0, 1, 18, 130, 195), num_keys=20, num_values=40)
case("weak half precision packed", "vector", **several, **weak)(compare)
case("weak half precision in pieces", "vector", num_tokens=400, processors=5, **weak)(compare)
case("borderline half precision", "vector", num_tokens=300, **{**weak, "change": borderline})(compare)


@case("which chunks are weak")
def which_are_weak() -> Errors:
    """Those whose halves keep enough of every row, and no other: by levels and back in one call."""
    from linear_moe.kernels.triton.delta_launch import DeltaChunks

    found: Errors = {}
    for change, expected in ((mostly_weak, [1, 0, 1, 1, 1]), (borderline, [1, 0, 0, 0, 1])):
        tensors = make(OP, "vector", num_tokens=300, **ONE).tensors
        change(tensors)
        q, k, v = (tensors[name].half() for name in "qkv")
        chunks = DeltaChunks.plan(k, v, tensors["log_decay"].float(), None, 1.0)
        weak = chunks.solve(q, k, tensors["beta"].float()).weak
        found[change.__name__] = error(weak[:, 0], torch.tensor(expected))
    return found


@case("roundings of half precision")
def roundings() -> Errors:
    """RMS errors of a memory that hardly fades; of bfloat16, which is wrong in the interpreter, 8 times these."""
    from linear_moe.kernels.triton import delta

    random = torch.Generator().manual_seed(0)
    shape, width = (1, 192, 1), 32
    q, k, v = (torch.randn(*shape, width, generator=random) for _ in range(3))
    beta, log_decay = torch.rand(shape, generator=random), -0.02 * torch.rand(*shape, width, generator=random)
    k = torch.nn.functional.normalize(k, dim=-1)
    given = [x.half() for x in (q, k, v, beta, log_decay)]
    found, exact = delta.delta_rule(*given), reference.delta_rule(*(x.double() for x in given))
    relative = ((x.double() - y).norm() / y.norm() for x, y in zip(found, exact))
    return dict(zip(("o", "state"), (x.item() for x in relative)))


case("pieces of two rows", "scalar", num_tokens=75, processors=8, groups=1, num_heads=1, has_state=False)(
    compare
)
case("keys wider than values", "none", num_tokens=20, num_keys=130, num_values=3, **ONE)(compare)


def strided(decay: str) -> Errors:
    from linear_moe.kernels.triton import delta

    def unchanged(x: torch.Tensor) -> torch.Tensor:
        assert x.stride(-1) == 1 and not x.is_contiguous()
        return x

    with mock.patch.object(delta, "rows_together", unchanged):
        inputs = make(OP, decay, num_tokens=41, groups=2, num_heads=2, num_values=6)
        one_projection(inputs.tensors)
        inputs = inputs.to(torch.float32)
        one_projection(inputs.tensors)
        with configured(16), torch.no_grad():
            o, state = inputs.run(kernels)
    truth = inputs.to(torch.float64).run(reference)
    forward = {"o": error(o, truth[0]), "state": error(state, truth[1])}
    sizes = dict(num_tokens=41, groups=2, num_heads=2, num_values=6, batch=1)
    return {**forward, **compare(decay, change=one_projection, **sizes)}


def isolated(decay: str) -> Errors:
    """Documents never see each other: the same bits, whatever one of them holds; and the same bits in every run."""
    inputs = make(OP, decay, num_tokens=60, cu_seqlens=(0, 5, 5, 40, 60), groups=1, num_heads=1)
    inputs = inputs.to(torch.float32)
    with configured(16):
        first, second = (results(inputs, kernels) for _ in range(2))
        for name in ("q", "v", "beta"):
            inputs.tensors[name][:, 5:40] *= 0.5
        changed = inputs.run(kernels)
    assert all(torch.equal(x, second[name]) for name, x in first.items())
    tokens, documents = [t for t in range(60) if not 5 <= t < 40], [0, 1, 3]
    same_o = torch.equal(first["o"][:, tokens], changed[0][:, tokens])
    same_state = torch.equal(first["state_out"][documents], changed[1][documents])
    moved = not torch.equal(first["o"], changed[0])
    return {"o": float(not same_o), "state": float(not same_state), "it changed": float(not moved)}


for decay in DECAYS[2:]:
    case(f"{decay} strided, no copy", decay)(strided)
    last = dict(num_tokens=70, cu_seqlens=(0, 20, 20, 37))
    case(f"{decay} tokens after the last document", OP, decay, **last)(after_the_last_document)
    case(f"{decay} documents never see each other", decay)(isolated)
case("no documents", OP)(no_documents)
case("gradient through one result only", OP, "scalar", num_tokens=40)(through_one_result)
case("some inputs have no gradient", OP, "scalar", num_tokens=20)(some_gradients)


@case("runs fused")
def runs_fused() -> Errors:
    from linear_moe.kernels.triton import delta

    found: Errors = {}
    with mock.patch.object(delta, "delta_rule", side_effect=AssertionError("not for this call")):
        inputs = make(OP, "scalar", num_tokens=20)
        found["float64"] = error(inputs.run(kernels)[0], inputs.run(reference)[0])
        for decay in DECAYS:
            with pytest.raises(AssertionError, match="not for this call"):
                make(OP, decay, num_tokens=20).to(torch.float32).run(kernels)
    return found
