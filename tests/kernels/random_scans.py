"""Random calls of the recurrences: decays of every kind, gates at initialisation and adversarial ones, documents."""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from random_calls import Call, Dice, Outputs, Size
from torch import Tensor

FORGET = float("-inf")
KINDS = {
    "diag_decay": ("none", "head", "scalar", "vector", "bonus", "values"),
    "delta_rule": ("none", "head", "scalar", "vector"),
}
LOW_RANK = "dplr_delta_rule"
SEGMENTS = {
    "diag_decay_segment": "diag_decay",
    "delta_rule_segment": "delta_rule",
    "dplr_delta_rule_segment": LOW_RANK,
}
GATES = ("initial", "initial", "uniform", "strong", "none", "e^-30", "forget", "sudden", "uneven")
BETAS = ("uniform", "uniform", "zero", "one", "either")


def scan(op: str, kind: str, dtype: torch.dtype, size: Size, dice: Dice) -> Call:
    """A call of a recurrence, or of its segments."""
    family, geometry = SEGMENTS.get(op, op), dice.geometry
    is_packed, has_state = geometry.random() < 0.4, geometry.random() < 0.6
    heads = geometry.randint(1, size.heads)
    groups = geometry.choice([g for g in range(1, heads + 1) if heads % g == 0])
    keys, values = dice.dim(size.dim), dice.dim(size.dim)
    batch = 1 if is_packed else geometry.randint(1, size.batch)
    num_tokens = dice.tokens(size, batch * heads * keys * values)
    call = Call(op, dtype, [kind, f"K{keys}V{values}", f"H{heads}G{groups}"], run=run)
    call.tensors = {
        "q": dice.normal(batch, num_tokens, groups, keys),
        "k": dice.normal(batch, num_tokens, groups, keys),
        "v": dice.normal(batch, num_tokens, heads, values),
    }
    call.is_per_element = kind in ("vector", "bonus", "values")
    if family == "delta_rule":
        delta(call, dice)
    if family == LOW_RANK:
        low_rank(call, dice)
    decays(call, kind, dice)
    documents = dice.documents(num_tokens, size.documents) if is_packed else []
    if has_state and op == family:
        count = len(documents) - 1 if is_packed else batch
        call.tensors["state"] = dice.normal(count, heads, keys, values)
    if op != family:
        del call.tensors["q"]
    else:
        call.options["scale"] = dice.own.choice([1.0, keys**-0.5])
        call.upstream = dice.own.choice(["both", "both", "o", "state out", "sum"])
    call.layouts = {name: dice.layout() for name in call.tensors if name not in ("state", "bonus")}
    call.wide |= frozenset(
        name for name in ("log_decay", "log_decay_v", "bonus", "state") if geometry.random() < 0.7
    )
    if dtype == torch.float32 and geometry.random() < 0.4:
        gates_of = [name for name in call.tensors if name not in ("q", "k", "v", "state")]
        call.narrow = frozenset(geometry.sample(gates_of, min(1, len(gates_of))))
    names = list(call.tensors)
    if geometry.random() < 0.2:
        call.constant = frozenset(geometry.sample(names, geometry.randint(1, len(names) - 1)))
    call.words += [f"B{batch}T{num_tokens}", *(["packed"] if is_packed else []), call.upstream]
    rounded(call)
    if is_packed:
        call.tensors["cu_seqlens"] = torch.tensor(
            documents, dtype=dice.own.choice([torch.int32, torch.int64])
        )
        left_over(call, documents[-1])
    return call


def delta(call: Call, dice: Dice) -> None:
    """Keys of length one, all the same at times, and strengths."""
    call.tensors["k"] = F.normalize(call.tensors["k"], dim=-1)
    lead = call.tensors["v"].shape[:3]
    call.tensors["beta"] = strengths(call, lead, dice)
    one_key(call, "k", dice)


def low_rank(call: Call, dice: Dice) -> None:
    """As in RWKV7: what is held under a key of length one is taken away, as much of it as is drawn for each channel."""
    shape = call.tensors["k"].shape
    call.tensors["a"] = -F.normalize(dice.normal(*shape), dim=-1)
    one_key(call, "a", dice)
    call.tensors["b"] = -call.tensors["a"] * strengths(call, shape, dice)
    if dice.geometry.random() < 0.3:
        call.wide = frozenset({"a", "b"})
    call.is_per_element = True  # whatever the decay, there are only kernels of a decay per element


def strengths(call: Call, shape: tuple[int, ...], dice: Dice) -> Tensor:
    """From 0 to 1, how much of what a key holds is erased."""
    kind = dice.own.choice(BETAS)
    constant = {"zero": torch.zeros(shape).double(), "one": torch.ones(shape).double()}
    either = (dice.uniform(*shape) < 0.5).double()
    call.words.append(f"beta {kind}")
    return constant.get(kind, either if kind == "either" else dice.uniform(*shape))


def one_key(call: Call, name: str, dice: Dice) -> None:
    """At times the first key for all tokens."""
    x = call.tensors[name]
    if dice.own.random() < 0.15:
        x[:] = x[:, :1].clone()
        call.words.append("one key")
        call.slack = 8.0  # every token erases what the one before it wrote, and chunks sum all of it, rounded
    if x.shape[-1] < 8:
        call.slack = 30.0  # the same: keys of few dims are nearly parallel


def decays(call: Call, kind: str, dice: Dice) -> None:
    """``log_decay``, ``log_decay_v`` and ``bonus``."""
    batch, num_tokens, heads, values = call.tensors["v"].shape
    keys = call.tensors["k"].shape[-1]
    shapes = {
        "head": (heads,),
        "scalar": (batch, num_tokens, heads),
        "vector": (batch, num_tokens, heads, keys),
    }
    beside = kind
    if kind == "bonus":
        call.tensors["bonus"] = dice.normal(heads, keys)
        beside = dice.geometry.choice(["none", "head", "scalar", "vector", "vector", "vector"])
    if kind == "values":
        call.tensors["log_decay_v"] = gates(call, (batch, num_tokens, heads, values), dice)
        beside = dice.geometry.choice(["none", "none", "head", "scalar"])
    if beside in shapes:
        call.tensors["log_decay"] = gates(call, shapes[beside], dice)


def gates(call: Call, shape: tuple[int, ...], dice: Dice) -> Tensor:
    """Log decays as mixers begin with them, and others that they never had better have."""
    kind = dice.own.choice(GATES)
    call.words.append(f"gates {kind}")
    initial = F.logsigmoid(dice.normal(*shape) + 2) / 16
    if kind in ("initial", "uniform", "strong"):
        return initial if kind == "initial" else -dice.uniform(*shape) * (1.0 if kind == "uniform" else 20.0)
    if kind in ("none", "e^-30", "forget"):
        return torch.full(shape, {"none": 0.0, "e^-30": -30.0, "forget": FORGET}[kind], dtype=torch.float64)
    rare = 0.1 if kind == "sudden" else 0.4  # sudden: now and then; uneven: elements by themselves
    struck = dice.uniform(*shape) < rare
    if kind == "sudden" and len(shape) == 4:
        struck = struck[..., :1].expand(shape)
    how = torch.tensor([-30.0, -200.0, FORGET, -5.0], dtype=torch.float64)
    strong = how[torch.randint(0, 4, shape, generator=dice.generator)]
    return torch.where(struck, strong, initial)


def rounded(call: Call) -> None:
    """Everything starts from values that the dtype holds."""
    for name, x in call.tensors.items():
        if x.is_floating_point():
            call.tensors[name] = x.to(call.dtype_of(name)).double()


def left_over(call: Call, end: int) -> None:
    """What stands behind the last document is never looked at."""
    for name, x in call.tensors.items():
        if name not in ("state", "bonus", "cu_seqlens") and x.ndim > 1:
            x[:, end:] = float("nan")


def run(module: ModuleType | type, call: Call, given: dict[str, Tensor]) -> Outputs:
    """Both results, or what a segment holds."""
    found = getattr(module, call.op)(**given, **call.options)
    if call.op in SEGMENTS:
        parts = {"state out": found.state, "decay": found.decay}
        if found.log_decay is not None:
            parts["decay"] = found.log_decay.exp()
        return {name: x for name, x in parts.items() if x is not None}
    return dict(zip(("o", "state out"), found, strict=True))
