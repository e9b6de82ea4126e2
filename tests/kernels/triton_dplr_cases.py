"""Cases of the fused diagonal plus low-rank memory, and of its segments, which run_interpreted.py runs interpreted."""

from __future__ import annotations

from functools import partial
from unittest import mock

import fused_scans
import pytest
import torch
import triton_segment_cases as segments
from fused_scans import (
    FORGET,
    ONE,
    after_the_last_document,
    configured,
    decays,
    no_documents,
    one_projection,
    some_gradients,
    through_one_result,
)
from interpreted_cases import Cases, Errors
from scan_cases import PACKED, Inputs, error, make, results
from torch import Tensor

from linear_moe import kernels
from linear_moe.kernels import reference

OP = "dplr_delta_rule"
CASES = Cases()
case, fused = CASES.add, CASES.run
compare = partial(fused_scans.compare, OP)
compare_segment = partial(compare, results=segments.results, errors=segments.errors)
DECAYS = ("none", "head", "scalar", "vector")


def unrelated(tensors: dict[str, Tensor]) -> None:
    """a and b that have nothing to do with each other, and b not small: what RWKV7 never has."""
    generator = torch.Generator().manual_seed(3)
    for name in ("a", "b"):
        x = torch.randn(tensors[name].shape, generator=generator, dtype=torch.float64)
        tensors[name].copy_(0.7 * torch.nn.functional.normalize(x, dim=-1))


def one_key(tensors: dict[str, Tensor]) -> None:
    """One key removed in full by every token and written by the next: the worst case for the inverse."""
    for name in ("k", "a", "b"):
        tensors[name][:] = tensors["a"][:, :1] * (-1 if name == "b" else 1)


def uneven(tensors: dict[str, Tensor]) -> None:
    """Sudden and total forgetting of single rows beside rows that hardly forget."""
    log_decay = tensors["log_decay"]
    log_decay[:, 5:30:2] = -30.0
    log_decay[:, 33:39] = -200.0
    log_decay[:, 7:60:19] = FORGET
    log_decay[..., ::3] = -1e-3


def mostly_weak(tensors: dict[str, Tensor]) -> None:
    """What float16's chunks keep is enough for one border for all of their pairs, but in the second."""
    tensors["log_decay"][:] *= 0.1
    tensors["log_decay"][:, 70:80, :, 3] = -3.0


for decay in DECAYS[:3]:
    case(f"{decay} rows", decay, num_tokens=20, **ONE)(compare)
case("vector rows", "vector", num_tokens=35, groups=2, num_heads=4, batch=1)(compare)
case("pieces of two rows", "vector", num_tokens=60, processors=8, groups=1, num_heads=1, has_state=False)(
    compare
)
case("packed", "vector", chunk=32, num_tokens=205, cu_seqlens=PACKED, groups=1, num_heads=1)(compare)
case("half precision", "vector", num_tokens=80, chunk=None, dtype=torch.float16, **ONE)(compare)
weak = dict(num_tokens=70, chunk=None, dtype=torch.float16, change=decays(-0.01))
case("half precision, weak", "vector", **weak, **ONE)(compare)
border = dict(chunk=None, dtype=torch.float16, change=mostly_weak, **ONE)
case("half precision, one border", "vector", num_tokens=200, processors=0, **border)(compare)
documents = dict(num_tokens=200, cu_seqlens=(0, 0, 1, 18, 130, 195))
case("half precision, one border, packed", "vector", num_keys=20, num_values=40, **documents, **border)(
    compare
)
case("half precision, one border, segment", "vector", num_tokens=150, **border)(compare_segment)
case("strong", "vector", num_tokens=40, change=decays(-30.0), **ONE)(compare)
case("forgets all", "vector", num_tokens=40, change=decays(FORGET), **ONE)(compare)
case("uneven", "vector", num_tokens=50, strength=0.01, change=uneven, **ONE)(compare)
case("factors that are unrelated", "vector", num_tokens=50, change=unrelated, **ONE)(compare)
case("one key", "vector", num_tokens=70, chunk=64, strength=0.01, change=one_key, **ONE)(compare)
case("one token", "vector", num_tokens=1, has_state=False, **ONE)(compare)
case("blocks", "vector", num_tokens=17, batch=1, num_keys=40, num_values=36, groups=1, num_heads=1)(compare)
case("values wider than keys", "vector", num_tokens=17, num_keys=3, num_values=70, **ONE)(compare)
last = dict(num_tokens=70, cu_seqlens=(0, 20, 20, 37))
case("tokens after the last document", OP, "vector", **last)(after_the_last_document)
case("no documents", OP)(no_documents)
case("gradient through one result only", OP, "vector", num_tokens=40)(through_one_result)
case("some inputs have no gradient", OP, "vector", num_tokens=16)(some_gradients)

case("segment rows", "vector", num_tokens=20, batch=2, groups=1, num_heads=2)(compare_segment)
case("segment pieces", "vector", num_tokens=70, processors=5, **ONE)(compare_segment)
short = dict(num_tokens=60, cu_seqlens=segments.SHORT, groups=1, num_heads=1)
case("segment packed", "scalar", **short)(compare_segment)
half = dict(num_tokens=70, chunk=None, dtype=torch.float16, strength=0.02)
case("segment half precision", "vector", **half, **ONE)(compare_segment)
case("segment uneven", "vector", num_tokens=50, strength=0.01, change=uneven, **ONE)(compare_segment)
case("segment blocks", "none", num_tokens=17, num_keys=20, num_values=40, **ONE)(compare_segment)
of_segments = dict(results=segments.results, errors=segments.errors)
case("segment, tokens after the last document", OP, "vector", **last, **of_segments)(after_the_last_document)


@case("strided, no copy")
def strided() -> Errors:
    """Views, sequence first, of which no kernel gets a copy."""
    from linear_moe.kernels.triton import dplr

    def unchanged(x: Tensor) -> Tensor:
        assert x.stride(-1) == 1 and not x.is_contiguous()
        return x

    inputs = make(OP, "vector", num_tokens=20, groups=2, num_heads=2, num_values=6).to(torch.float32)
    one_projection(inputs.tensors, ("q", "k", "v", "a", "b"))
    with mock.patch.object(dplr, "rows_together", unchanged), configured(), torch.no_grad():
        found = dict(zip(("o", "state"), inputs.run(kernels), strict=True))
    truth = dict(zip(("o", "state"), inputs.to(torch.float64).run(reference), strict=True))
    sizes = dict(num_tokens=20, groups=2, num_heads=2, num_values=6, batch=1)
    change = partial(one_projection, names=("q", "k", "v", "a", "b"))
    return {**fused_scans.errors(found, truth), **compare("vector", change=change, **sizes)}


@case("half precision of all but a, b and the decay")
def wide_gates() -> Errors:
    inputs = make(OP, "vector", num_tokens=70, **ONE).to(torch.float16)
    for name in ("a", "b", "log_decay", "state"):
        inputs.tensors[name] = inputs.tensors[name].float()
    with configured(None):
        found = results(inputs, kernels)
    assert all(found[f"grad {name}"].dtype == x.dtype for name, x in inputs.tensors.items())
    return fused_scans.errors(found, results(inputs.to(torch.float64), reference))


@case("documents never see each other")
def isolated() -> Errors:
    """The same bits, whatever one of them holds; and the same bits in every run, also under autocast."""
    inputs = make(OP, "vector", num_tokens=60, cu_seqlens=(0, 5, 5, 40, 60), groups=1, num_heads=1)
    inputs = inputs.to(torch.float32)
    with configured():
        first = results(inputs, kernels)
        with torch.autocast("cpu", torch.bfloat16):
            second = results(inputs, kernels)
        for name in ("q", "v", "b"):
            inputs.tensors[name][:, 5:40] *= 0.5
        o, state = inputs.run(kernels)
    same = {name: float(not torch.equal(x, second[name])) for name, x in first.items()}
    tokens, documents = [t for t in range(60) if not 5 <= t < 40], [0, 1, 3]
    same["other o"] = float(not torch.equal(first["o"][:, tokens], o[:, tokens]))
    same["other state"] = float(not torch.equal(first["state_out"][documents], state[documents]))
    return {**same, "it changed": float(torch.equal(first["o"], o))}


@case("runs fused")
def runs_fused() -> Errors:
    from linear_moe.kernels.triton import dplr, dplr_segment

    found: Errors = {}
    refuse = dict(side_effect=AssertionError("not for this call"))
    with (
        mock.patch.object(dplr, "dplr_delta_rule", **refuse),
        mock.patch.object(dplr_segment, "dplr_delta_rule_segment", **refuse),
    ):
        inputs = make(OP, "vector", num_tokens=20)
        found["float64"] = error(inputs.run(kernels)[0], inputs.run(reference)[0])
        found["float64 segment"] = error(inputs.segment(kernels).state, inputs.segment(reference).state)
        for decay in DECAYS:
            single: Inputs = make(OP, decay, num_tokens=20).to(torch.float32)
            for run in (single.run, single.segment):
                with pytest.raises(AssertionError, match="not for this call"):
                    run(kernels)
    return found
