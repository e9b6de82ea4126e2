"""Random calls of what stands around the recurrences and the experts."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import torch
from random_calls import Call, Dice, Outputs, Size
from random_scans import rounded
from torch import Tensor


def short_conv(dtype: torch.dtype, size: Size, dice: Dice) -> Call:
    """One to three dims of channels, packed or not, with and without history, bias and activation."""
    geometry = dice.geometry
    channels = [geometry.randint(1, 5) for _ in range(geometry.randint(0, 2))] + [dice.dim(size.dim)]
    width, is_packed = geometry.randint(1, 4), geometry.random() < 0.5
    batch, num_tokens = 1 if is_packed else geometry.randint(1, size.batch), dice.tokens(size)
    activation = geometry.choice([None, "silu"])
    call = Call("short_conv", dtype, [f"C{channels}W{width}", f"B{batch}T{num_tokens}"], run=run_conv)
    call.tensors = {"x": dice.normal(batch, num_tokens, *channels), "weight": dice.normal(*channels, width)}
    if geometry.random() < 0.5:
        call.tensors["bias"] = dice.normal(*channels)
    offsets = dice.documents(num_tokens, size.documents) if is_packed else []
    if geometry.random() < 0.5:
        count = len(offsets) - 1 if is_packed else batch
        call.tensors["state"] = dice.normal(count, width - 1, *channels)
    call.options["activation"] = activation
    call.upstream = dice.own.choice(["both", "y", "sum"])
    call.layouts = {"x": dice.layout()}
    call.wide = frozenset({"weight", "bias"} if geometry.random() < 0.3 else ())
    rounded(call)
    if is_packed:
        call.words.append("packed")
        call.tensors["cu_seqlens"] = torch.tensor(offsets, dtype=torch.int32)
    return call


def run_conv(module: ModuleType | type, call: Call, given: dict[str, Tensor]) -> Outputs:
    """Outputs, and the last inputs, which are copies."""
    y, last = module.short_conv(**given, **call.options)
    return {"y": y, "last inputs": last}


def gated_rms_norm(dtype: torch.dtype, size: Size, dice: Dice) -> Call:
    """With and without weight and gate; rows that are nearly zero, where eps counts."""
    geometry = dice.geometry
    heads, width = geometry.randint(1, size.heads), dice.dim(size.dim)
    shape = geometry.randint(1, size.batch), dice.tokens(size), heads, width
    call = Call("gated_rms_norm", dtype, [f"{list(shape)}"], run=run_norm)
    call.tensors["x"] = dice.normal(*shape)
    call.tensors["x"][dice.uniform(*shape[:3]) < 0.1] *= 1e-3
    weights = geometry.choice([None, (width,), (heads, width)])
    if weights is not None:
        call.tensors["weight"] = dice.normal(*weights)
    if geometry.random() < 0.7:
        call.tensors["gate"] = 3 * dice.normal(*shape)
        call.layouts["gate"] = dice.layout()
    call.layouts["x"] = dice.layout()
    call.options = dict(
        activation=geometry.choice(["swish", "sigmoid"]), eps=geometry.choice([1e-6, 1e-5, 1e-6 / width])
    )
    call.options["scale"] = geometry.choice([1.0, width**-0.5])
    call.wide = frozenset({"weight"} if geometry.random() < 0.3 else ())
    call.upstream = dice.own.choice(["y", "sum"])
    rounded(call)
    return call


def run_norm(module: ModuleType | type, call: Call, given: dict[str, Tensor]) -> Outputs:
    """One result."""
    return {"y": module.gated_rms_norm(**given, **call.options)}


def cross_entropy_(dtype: torch.dtype, size: Size, dice: Dice) -> Call:
    """Logits near and far apart, of few and of many classes; some weights are zero."""
    rows, classes = (
        dice.tokens(replace(size, tokens=size.tokens // 8)),
        dice.own.choice([1, 2, 300, dice.own.randint(1, 20 * size.tokens)]),
    )
    call = Call("cross_entropy_", dtype, [f"{rows}x{classes}"], run=run_loss)
    call.tensors = {
        "logits": dice.normal(rows, classes) * dice.own.choice([0.1, 3.0, 30.0]),
        "labels": torch.randint(0, classes, (rows,), generator=dice.generator),
        "weight": dice.uniform(rows) * (dice.uniform(rows) < 0.8),
    }
    call.tensors["labels"][0], call.tensors["weight"][0] = (
        call.tensors["logits"][0].argmin(),
        1.0,
    )  # one counts
    call.layouts = {"logits": dice.geometry.choice(["dense", "slice"])}
    call.wide, call.constant = frozenset({"weight"}), frozenset({"logits", "weight"})
    rounded(call)
    return call


def run_loss(module: ModuleType | type, call: Call, given: dict[str, Tensor]) -> Outputs:
    """The losses, and the logits, which are their gradient then."""
    loss = module.cross_entropy_(**given)
    return {"loss": loss, "grad logits": given["logits"]}


def spread_rows(dtype: torch.dtype, size: Size, dice: Dice) -> Call:
    """From tokens to slots."""
    return _rows("spread_rows", dtype, size, dice)


def collect_rows(dtype: torch.dtype, size: Size, dice: Dice) -> Call:
    """From slots to tokens, with and without weights."""
    return _rows("collect_rows", dtype, size, dice)


def _rows(op: str, dtype: torch.dtype, size: Size, dice: Dice) -> Call:
    geometry = dice.geometry
    tokens, slots = dice.tokens(replace(size, tokens=size.tokens // 4)), geometry.randint(1, 8)
    channels = geometry.choice([[dice.dim(size.dim)], [geometry.randint(1, 6), dice.dim(size.dim)], [1500]])
    call = Call(op, dtype, [f"S{tokens}k{slots}C{channels}"], run=run_rows)
    place = torch.randperm(tokens * slots, generator=dice.generator)
    rows = tokens if op == "spread_rows" else tokens * slots
    call.tensors = {
        "x": dice.normal(rows, *channels),
        "order": torch.argsort(place),
        "place": place.view(tokens, slots),
    }
    if op == "collect_rows" and geometry.random() < 0.6:
        call.tensors["weight"] = dice.uniform(tokens, slots)
    call.layouts = {"x": geometry.choice(["dense", "slice", "columns"])}
    call.upstream = dice.own.choice(["y", "sum"])
    rounded(call)
    return call


def run_rows(module: ModuleType | type, call: Call, given: dict[str, Tensor]) -> Outputs:
    """One result."""
    return {"y": getattr(module, call.op)(**given)}


def weighted_swiglu(dtype: torch.dtype, size: Size, dice: Dice) -> Call:
    """Rows of gate and up, and a probability each."""
    rows, width = dice.tokens(size), dice.dim(3 * size.dim)
    call = Call("weighted_swiglu", dtype, [f"{rows}x{width}"], run=run_unit)
    call.tensors = {"x": 3 * dice.normal(rows, 2 * width), "weight": dice.uniform(rows)}
    call.layouts = {"x": dice.geometry.choice(["dense", "slice", "columns"])}
    call.wide = frozenset({"weight"} if dice.geometry.random() < 0.5 else ())
    call.upstream = dice.own.choice(["y", "sum"])
    rounded(call)
    return call


def run_unit(module: ModuleType | type, call: Call, given: dict[str, Tensor]) -> Outputs:
    """One result."""
    return {"y": module.weighted_swiglu(**given)}


def rotate_heads(dtype: torch.dtype, size: Size, dice: Dice) -> Call:
    """Angles of a few turns and of many, for all channels or some; several query heads for a key head or fewer."""
    geometry = dice.geometry
    batch, heads, groups = (geometry.randint(1, n) for n in (size.batch, 4 * size.heads, 2 * size.heads))
    num_tokens, width = dice.tokens(size), max(2, dice.dim(size.dim))
    num_angles = geometry.choice([width // 2, geometry.randint(1, width // 2)])
    words = [f"B{batch}T{num_tokens}H{heads}G{groups}K{width}R{num_angles}"]
    call = Call("rotate_heads", dtype, words, run=run_rotary)
    call.tensors = {"q": dice.normal(batch, num_tokens, heads, width)}
    call.tensors["k"] = dice.normal(batch, num_tokens, groups, width)
    call.tensors["angles"] = dice.uniform(batch, num_tokens, num_angles) * dice.own.choice([6.0, 1e3, -1e6])
    call.layouts = {name: dice.layout() for name in call.tensors}
    call.wide = call.constant = frozenset({"angles"})
    call.options["scale"] = geometry.choice([1.0, 1.2])
    call.upstream = dice.own.choice(["both", "q", "k", "sum"])
    rounded(call)
    return call


def run_rotary(module: ModuleType | type, call: Call, given: dict[str, Tensor]) -> Outputs:
    """Both results."""
    return dict(zip(("q", "k"), module.rotate_heads(**given, **call.options), strict=True))


def rms_norm(dtype: torch.dtype, size: Size, dice: Dice) -> Call:
    """Tokens of a residual stream, narrow and wide; rows that are nearly zero, where eps counts."""
    geometry = dice.geometry
    width = geometry.choice([dice.dim(size.dim), geometry.randint(1, 16 * size.dim), 8 * size.dim])
    shape = geometry.randint(1, size.batch), dice.tokens(size), width
    call = Call("rms_norm", dtype, [f"{list(shape)}"], run=run_stream)
    call.tensors = {"x": dice.normal(*shape), "weight": dice.normal(width)}
    call.tensors["x"][dice.uniform(*shape[:2]) < 0.1] *= 1e-3
    call.layouts = {"x": dice.layout()}
    call.options = dict(eps=geometry.choice([1e-6, 1e-5]))
    call.wide = frozenset({"weight"} if geometry.random() < 0.3 else ())
    call.upstream = dice.own.choice(["both", "y", "passed", "sum"])
    rounded(call)
    return call


def run_stream(module: ModuleType | type, call: Call, given: dict[str, Tensor]) -> Outputs:
    """The norm, and what is passed on."""
    return dict(zip(("y", "passed"), module.rms_norm(**given, **call.options), strict=True))


OPERATIONS = (short_conv, gated_rms_norm, cross_entropy_, spread_rows, collect_rows, weighted_swiglu)
