"""Cases of the fused segments, which run_interpreted.py runs in Triton's interpreter."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import fused_scans
import pytest
import torch
from fused_scans import (
    FORGET,
    ONE,
    after_the_last_document,
    configured,
    decay_of,
    decays,
    one_projection,
    repeated_keys,
)
from interpreted_cases import Cases, Errors
from scan_cases import Inputs, error, gradients, make
from torch import Tensor

from linear_moe import kernels
from linear_moe.kernels import reference

CASES = Cases()
case, fused = CASES.add, CASES.run
SHORT = (0, 0, 1, 18, 18, 50, 50)
"""Documents in 60 tokens; some empty, one of one token, and tokens after the last."""
TWO = dict(batch=1, groups=1, num_heads=2)


def parts(inputs: Inputs, module: Any) -> dict[str, Tensor]:
    segment = inputs.segment(module)
    named = dict(state=segment.state, log_decay=segment.log_decay, decay=segment.decay)
    return {name: x for name, x in named.items() if x is not None}


def results(inputs: Inputs, module: Any) -> dict[str, Tensor]:
    """The parts of a segment and, from fixed random upstream gradients, those of all its inputs."""
    inputs = inputs.differentiable()
    found = parts(inputs, module)
    used = {name: x for name, x in inputs.tensors.items() if x.requires_grad and name not in ("q", "state")}
    return {**found, **gradients(list(found.values()), used)}


def errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> Errors:
    assert found.keys() == truth.keys()
    return {name: error(*(comparable(name, x[name]) for x in (found, truth))) for name in truth}


def comparable(name: str, x: Tensor) -> Tensor:
    """Logs below -140 are all 0 in float32; of what erasing leaves of the identity, the distance to the identity."""
    if name == "log_decay":
        return x.clamp(min=-140.0)
    return x - torch.eye(x.shape[-1], dtype=x.dtype) if name == "decay" else x


compare = partial(fused_scans.compare, results=results, errors=errors)


def uneven(tensors: dict[str, Tensor]) -> None:
    """Sudden and total forgetting, for a vector beside elements that hardly forget."""
    log_decay = decay_of(tensors)
    log_decay[:, 10:30:2] = -30.0
    log_decay[:, 35:45] = -200.0
    log_decay[:, 17:60:29] = FORGET
    if log_decay.ndim == 4:
        log_decay[..., ::3] = -1e-3


DIAG = {name: ("diag_decay", name, "") for name in ("none", "head", "scalar", "vector")}
DIAG["values"] = ("diag_decay", "none", "log_decay_v")
DELTA = {f"delta {name}": ("delta_rule", name, "") for name in ("none", "head", "scalar", "vector")}
for name, (op, decay, extra) in DIAG.items():
    kind = dict(op=op, decay=decay, extra=extra)
    case(f"{name} rows", num_tokens=40, processors=0, **kind)(compare)
    case(f"{name} segments", num_tokens=150, processors=16, **TWO, **kind)(compare)
    case(f"{name} packed", num_tokens=60, cu_seqlens=SHORT, groups=1, num_heads=2, processors=16, **kind)(
        compare
    )
    half = dict(dtype=torch.float16, chunk=None, num_tokens=150, processors=4)
    case(f"{name} half precision", **half, **ONE, **kind)(compare)
    case(f"{name} blocks", num_tokens=20, num_keys=40, num_values=35, **ONE, **kind)(compare)
    if name != "none":
        for processors in (0, 16):
            long = dict(num_tokens=140, processors=processors, **ONE, **kind)
            if name != "head":
                case(f"{name} uneven, {processors}", strength=0.01, change=uneven, **long)(compare)
            case(f"{name} e^-30, {processors}", change=decays(-30.0), **long)(compare)
            case(f"{name} forgets all, {processors}", change=decays(FORGET), **long)(compare)
case("one token", "diag_decay", "vector", num_tokens=1, **ONE)(compare)
wide = dict(num_tokens=50, num_keys=130, dtype=torch.float16, chunk=None, **ONE)
case("short chunks of wide keys, half precision", "diag_decay", "vector", **wide)(compare)
case("values and scalar", "diag_decay", "scalar", extra="log_decay_v", num_tokens=50, **TWO)(compare)
case("values and head, packed", "diag_decay", "head", extra="log_decay_v", num_tokens=60, cu_seqlens=SHORT)(
    compare
)
for name, (op, decay, _) in DELTA.items():
    kind = dict(op=op, decay=decay)
    case(f"{name} rows", num_tokens=25, **({} if decay == "scalar" else TWO), **kind)(compare)
    case(f"{name} pieces", num_tokens=100, processors=5, **ONE, **kind)(compare)
    if decay in ("scalar", "vector"):
        case(f"{name} packed", num_tokens=60, cu_seqlens=SHORT, groups=1, num_heads=1, **kind)(compare)
        half = dict(num_tokens=70, chunk=None, dtype=torch.float16, strength=0.02)
        case(f"{name} half precision", **half, **ONE, **kind)(compare)
        case(f"{name} uneven", num_tokens=60, strength=0.01, change=uneven, **ONE, **kind)(compare)
        case(f"{name} blocks", num_tokens=17, num_keys=20, num_values=40, **ONE, **kind)(compare)
half = dict(dtype=torch.float16, chunk=None, num_tokens=130, strength=0.2, processors=0)
case("delta vector half precision, weak", "delta_rule", "vector", **half, **ONE)(compare)
erased = dict(num_tokens=70, chunk=64, change=repeated_keys, strength=0.01, **ONE)
case("delta repeated keys", "delta_rule", "scalar", **erased)(compare)


@case("strided, no copy")
def strided() -> Errors:
    """Its arguments are views, and no kernel gets a copy of one."""
    from linear_moe.kernels.triton import delta_segment, diag_segment

    def unchanged(x: Tensor) -> Tensor:
        assert x.stride(-1) == 1 and not x.is_contiguous()
        return x

    found: Errors = {}
    kinds = [*(DIAG[name] for name in ("scalar", "vector", "values")), DELTA["delta vector"]]
    for op, decay, extra in kinds:
        module = diag_segment if op == "diag_decay" else delta_segment
        sizes = dict(num_tokens=41, groups=2, num_heads=2, num_values=6)
        inputs = make(op, decay, extra=extra, **sizes).to(torch.float32)
        truth = results(inputs.to(torch.float64), reference)
        one_projection(inputs.tensors, ("k", "v"))
        with mock.patch.object(module, "rows_together", unchanged), configured(16, 4):
            of_kind = errors(results(inputs, kernels), truth)
        found.update({f"{op} {decay} {extra} {name}": value for name, value in of_kind.items()})
    return found


LAST = dict(num_tokens=70, cu_seqlens=(0, 20, 20, 37), processors=4)
for ending, (op, decay, extra) in {
    "": DIAG["scalar"],
    ", vector": DIAG["vector"],
    ", values": DIAG["values"],
    ", delta": DELTA["delta scalar"],
    ", delta vector": DELTA["delta vector"],
}.items():
    kind = dict(op=op, decay=decay, extra=extra, results=results, errors=errors, **LAST)
    case("tokens after the last document" + ending, **kind)(after_the_last_document)


@case("no documents")
def no_documents() -> Errors:
    """Nothing but the identity."""
    found: Errors = {}
    for op in ("diag_decay", "delta_rule"):
        inputs = make(op, "scalar", num_tokens=20, cu_seqlens=(0, 0, 0), num_heads=1, groups=1).to(
            torch.float32
        )
        memory = inputs.tensors["state"]
        found[op] = error(inputs.segment(kernels).carry(memory), memory)
    return found


@case("gradient through one result only")
def through_one_result() -> Errors:
    """Also of inputs that do not need one."""
    found: Errors = {}
    for op, decay, extra in (DIAG["scalar"], DIAG["vector"], DIAG["values"], DELTA["delta scalar"]):
        inputs = make(op, decay, extra=extra, num_tokens=70, **ONE).to(torch.float32)
        names = [n for n in inputs.tensors if n not in ("q", "state")]
        for part in parts(inputs, reference):
            of_part = names if part == "state" else ["log_decay"] if "log_decay" in names else names[-1:]
            grads = []
            for leaves, module in ((inputs, kernels), (inputs.to(torch.float64), reference)):
                tensors = {n: x.detach().requires_grad_(n in of_part) for n, x in leaves.tensors.items()}
                with configured(16, 16):
                    y = parts(Inputs(op, tensors), module)[part].square().sum()
                    grads.append(torch.autograd.grad(y, [tensors[n] for n in of_part]))
            for name, *pair in zip(of_part, *grads):
                found[f"{op} {decay} {extra}: {name} from {part}"] = error(*pair)
    return found


@case("same bits in every run, and under autocast", DIAG["scalar"])
@case("same bits in every run, and under autocast, vector", DIAG["vector"])
@case("same bits in every run, and under autocast, delta in pieces", DELTA["delta scalar"])
def same_bits(kind: tuple[str, str, str]) -> Errors:
    op, decay, extra = kind
    inputs = make(op, decay, extra=extra, num_tokens=70, **ONE).to(torch.float32)
    with configured(16, 16 if op == "diag_decay" else 5):
        first = results(inputs, kernels)
        with torch.autocast("cpu", torch.bfloat16):
            second = results(inputs, kernels)
    return {name: float(not torch.equal(x, second[name])) for name, x in first.items()}


@case("runs fused")
def runs_fused() -> Errors:
    from linear_moe.kernels.triton import delta_segment, diag_segment

    found: Errors = {}
    refuse = dict(side_effect=AssertionError("not for this call"))
    with (
        mock.patch.object(diag_segment, "diag_decay_segment", **refuse),
        mock.patch.object(delta_segment, "delta_rule_segment", **refuse),
    ):
        both = make("diag_decay", "vector", extra="log_decay_v", num_tokens=20).to(torch.float32)
        double = make("diag_decay", "scalar", num_tokens=20)
        for name, inputs in {"vectors on both sides": both, "float64": double}.items():
            found[name] = error(inputs.segment(kernels).state, inputs.segment(reference).state)
        for op, decay, extra in (*DIAG.values(), *DELTA.values()):
            with pytest.raises(AssertionError, match="not for this call"):
                make(op, decay, extra=extra, num_tokens=20).to(torch.float32).segment(kernels)
    return found


@case("two ranks", "diag_decay", "vector")
@case("two ranks, delta", "delta_rule", "scalar")
def two_ranks(op: str, decay: str) -> Errors:
    """Context parallelism, zigzag, packed documents and whole sequences, on fused kernels is the token loop."""
    from linear_moe.parallel import lasp2
    from linear_moe.parallel.layout import SequenceLayout
    from tests.parallel import ranks

    found: Errors = {}
    for packed in (False, True):
        documents = torch.tensor([[0, 5, 29, 29, 40]]) if packed else None
        whole = make(op, decay, batch=1, num_tokens=40, groups=1, num_heads=1, has_state=False, strength=0.2)
        whole = whole.to(torch.float32)

        def outputs(inputs: Inputs, documents: Tensor | None = documents) -> Tensor:
            layouts = [SequenceLayout(1, 40, 2, rank, documents) for rank in range(2)]

            def run(group: Any) -> Tensor:
                layout = layouts[group.rank()]
                tensors = {name: layout.runs(layout.take(x)) for name, x in inputs.tensors.items()}
                if layout.is_packed:
                    tensors["cu_seqlens"] = layout.run_cu_seqlens
                local = Inputs(op, tensors, inputs.scale)
                (state,) = lasp2.initial_states([local.segment(kernels)], layout, group)
                return layout.tokens(local.run(kernels, state=state)[0])

            with mock.patch.object(lasp2, "start_all_gather", ranks.start_all_gather), configured(16, 4):
                chunks = torch.stack([o.unflatten(1, (2, -1)) for o in ranks.on_ranks(2, run)])
            return layouts[0].natural_order(chunks).movedim(0, 1).flatten(1, 2)

        fused, truth = whole.differentiable(), whole.to(torch.float64).differentiable()
        bounds = dict(cu_seqlens=documents[0]) if documents is not None else {}
        pairs = (fused, outputs(fused)), (truth, truth.run(reference, **bounds)[0])
        of_both = [{"o": o, **gradients([o], inputs.tensors)} for inputs, o in pairs]
        found.update(
            {f"{name}, packed: {packed}": error(x, of_both[1][name]) for name, x in of_both[0].items()}
        )
    return found
