"""What instructions of sm_90 do to integers and predicates, for all threads of a program at once."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from emulator.accesses import MEMORY, access, spilled

if TYPE_CHECKING:
    from emulator.sass import Instruction, Threads

Value = Any
"""A number, one for each thread, or None: unknown. 32 bits, not negative."""
MASK, WIDE = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
Reader = Callable[[], Value]
COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
}


def signed(x: Value, bits: int = 32) -> Value:
    """Two's complement."""
    return (x ^ (1 << bits - 1)) - (1 << bits - 1)


def action(threads: Threads, one: Instruction) -> Callable[[Value], Any] | None:
    """Takes the guard, changes the registers, and returns addresses, if it goes to memory; None: nothing to do."""
    name, words = one.words[0], one.words
    if name in MEMORY:
        return access(threads, one)
    if name in ("LDL", "STL"):
        return spilled(threads, one)
    if name in (
        "BAR",
        "NOP",
        "BSSY",
        "BSYNC",
        "WARPGROUP",
        "FENCE",
        "MEMBAR",
        "LDGDEPBAR",
        "DEPBAR",
        "HGMMA",
    ):
        return None
    targets, sources = _split(one)
    if not targets:
        return None
    kind = name.removeprefix("U")
    kind = {"S2R": "S2", "S2UR": "S2", "R2UR": "MOV"}.get(name, kind)
    rule = RULES.get(kind)
    is_wide = "WIDE" in words or (kind in ("LDC", "IADD3") and "64" in words) or one.name == "CS2R"
    if rule is None:
        return lambda guard: [threads.set(x, None, guard) for x in targets] and None
    compute = rule(threads, words, sources, len(targets))
    registers, predicates = [x for x in targets if "P" not in x], [x for x in targets if "P" in x]

    def do(guard: Value) -> None:
        found = compute()
        value, *flags = found if isinstance(found, tuple) else (found,)
        if registers:
            (threads.set_wide if is_wide else threads.set)(registers[0], value, guard)
        else:
            flags = [value, *flags]
        for target, flag in zip(predicates, flags + [None] * len(predicates)):
            threads.set(target, flag, guard)

    return do


def _split(one: Instruction) -> tuple[list[str], list[str]]:
    """What it writes, at most a register and two predicates, and what it reads."""
    if one.words[0] in ("P2R", "R2P"):
        return one.operands[:1], one.operands[1:]
    count = registers = 0
    for x in one.operands:
        is_register = re.fullmatch(r"U?R(\d+|Z)", x) is not None
        is_predicate = re.fullmatch(r"U?P[0-6T]", x) is not None
        registers += is_register
        if not (is_register or is_predicate) or registers > 1 or count - registers == 2:
            break
        if is_register and one.words[0].endswith("SETP"):
            break
        count += 1
    return one.operands[:count], one.operands[count:]


def _known(function: Callable[..., Any], *readers: Reader) -> Reader:
    def compute() -> Value:
        values = [read() for read in readers]
        return None if any(x is None for x in values) else function(*values)

    return compute


def _add(threads: Threads, words: list[str], sources: list[str], targets: int) -> Reader:
    if "64" in words:
        return _known(lambda *x: sum(x), *map(threads.wide_reader, sources[:3]))
    carries = [x for x in sources if re.fullmatch(r"!?U?P[0-6T]", x)]
    numbers = [x for x in sources if x not in carries]

    def negated(name: str) -> Reader:
        """With the carry that ~x + 1 has for 0."""
        if name.startswith("-") and not name.startswith("-0x"):
            return _known(lambda x: (~x & MASK) + 1, threads.reader(name[1:]))
        return threads.reader(name)

    readers = [*map(negated, numbers), *(map(threads.reader, carries) if "X" in words else ())]

    def both(*x: Value) -> Value:
        total = sum(x)
        return total & MASK, total >> 32, total >> 32

    compute = _known(both, *readers)
    return lambda: compute() or (None, None, None)


def _multiply(threads: Threads, words: list[str], sources: list[str], targets: int) -> Reader:
    a, b = map(threads.reader, sources[:2])
    is_signed = "U32" not in words
    if "WIDE" in words or "HI" in words:
        c = threads.wide_reader(sources[2])
        number = signed if is_signed else lambda x: x

        def wide(x: Value, y: Value, z: Value) -> Value:
            x, y = (np.asarray(number(v), np.int64).astype(np.uint64) for v in (x, y))
            z = np.uint64(z & WIDE) if isinstance(z, int) else z.astype(np.uint64)
            total = x * y + z
            high = total.astype(np.int64) if is_signed else total
            return (high >> np.uint8(32)).astype(np.int64) & MASK if "HI" in words else total.astype(np.int64)

        return _known(wide, a, b, c)
    carry = threads.reader(sources[3]) if "X" in words and len(sources) > 3 else lambda: 0

    def plain(x: Value, y: Value, z: Value, w: Value) -> Value:
        product = np.asarray(x, np.int64) * np.asarray(y, np.int64)
        return (product + z + w) & MASK, None

    return _known(plain, a, b, threads.reader(sources[2]), carry)


def _lea(threads: Threads, words: list[str], sources: list[str], targets: int) -> Reader:
    carry: Reader = lambda: 0  # noqa: E731
    if "X" in words:
        carry, sources = threads.reader(sources[-1]), sources[:-1]
    shift = threads.reader(sources[-1])
    a, b = map(threads.reader, sources[:2])
    if "HI" not in words:

        def low(x: Value, y: Value, s: Value, c: Value) -> Value:
            total = (np.asarray(x, np.int64) << s & MASK) + y + c
            return total & MASK, total >> 32

        return _known(low, a, b, shift, carry)
    has_high = "SX32" not in words and len(sources) > 3
    c = threads.reader(sources[2]) if has_high else (lambda: None)

    def high(x: Value, y: Value, s: Value, w: Value) -> Value:
        top = np.where(np.asarray(x) >> 31 & 1, MASK, 0) if "SX32" in words else c() if has_high else 0
        if top is None:
            return None, None
        shifted = (np.asarray(top, np.int64) << s | np.asarray(x, np.int64) >> (32 - s)) & MASK
        total = shifted + y + w
        return total & MASK, total >> 32

    return _known(high, a, b, shift, carry)


def _logic(threads: Threads, words: list[str], sources: list[str], targets: int) -> Reader:
    table = next(int(x, 16) for x in reversed(sources) if x.startswith("0x") and x is not sources[2])

    def three(x: Value, y: Value, z: Value) -> Value:
        total: Value = 0
        for n in range(8):
            if table >> n & 1:
                total = total | (x if n & 4 else ~x) & (y if n & 2 else ~y) & (z if n & 1 else ~z)
        total = total & MASK
        return total if targets == 1 else (total, np.asarray(total) != 0)

    return _known(three, *map(threads.reader, sources[:3]))


def _logic_of_predicates(threads: Threads, words: list[str], sources: list[str], targets: int) -> Reader:
    table = int(sources[3], 16)

    def three(x: Value, y: Value, z: Value) -> Value:
        return np.asarray(table >> ((x + 0 << 2) | (y + 0 << 1) | z + 0) & 1)

    return _known(three, *map(threads.reader, sources[:3]))


def _shift(threads: Threads, words: list[str], sources: list[str], targets: int) -> Reader:
    is_left, is_signed, gives_high = "L" in words, "S32" in words or "S64" in words, "HI" in words

    def funnel(low: Value, by: Value, high: Value) -> Value:
        low, high = np.asarray(low, np.int64), np.asarray(high, np.int64)
        by = np.minimum(by, 63)
        if is_left:
            return ((high << by | low >> np.maximum(32 - by, 0)) if gives_high else low << by) & MASK
        if gives_high:
            return (signed(high) if is_signed else high) >> by & MASK
        return (low >> by | high << np.maximum(32 - by, 0)) & MASK

    return _known(funnel, *map(threads.reader, sources[:3]))


def _compare(threads: Threads, words: list[str], sources: list[str], targets: int) -> Reader:
    how, is_signed = COMPARE[words[1]], "U32" not in words
    a, b, *rest = map(threads.reader, sources)
    also_or = "OR" in words
    lower = rest[1] if "EX" in words else None

    def compare(x: Value, y: Value, z: Value, w: Value) -> Value:
        x, y = (np.asarray(signed(v) if is_signed else v) for v in (x, y))
        found = how(x, y)
        if lower is not None:
            if words[1] == "NE":
                found = (x != y) | (np.asarray(w) != 0)
            else:
                found = (COMPARE[words[1][0] + "T"](x, y) if words[1] != "EQ" else False) | (
                    (x == y) & (np.asarray(w) != 0)
                )
        z = np.asarray(z) != 0
        first = found | z if also_or else found & z
        return np.asarray(first, np.int64), np.asarray(~found | z if also_or else ~found & z, np.int64)

    combined = rest[0] if rest else (lambda: 1)
    compute = _known(compare, a, b, combined, lower or (lambda: 1))
    return lambda: compute() or (None, None)


def _select(threads: Threads, words: list[str], sources: list[str], targets: int) -> Reader:
    return _known(lambda x, y, p: np.where(np.asarray(p, bool), x, y), *map(threads.reader, sources[:3]))


def _extreme(threads: Threads, words: list[str], sources: list[str], targets: int) -> Reader:
    number = (lambda x: x) if "U32" in words else signed

    def choose(x: Value, y: Value, p: Value) -> Value:
        x, y = np.asarray(number(x)), np.asarray(number(y))
        found = np.where(np.asarray(p, bool), np.minimum(x, y), np.maximum(x, y))
        return np.maximum(found, 0) & MASK if "RELU" in words else found & MASK

    readers = [threads.reader(x) for x in sources]
    if len(readers) == 4:  # VIADDMNMX
        return _known(lambda a, b, c, p: choose((a + b) & MASK, c, p), *readers)
    return _known(choose, *readers[:3])


def _extend(threads: Threads, words: list[str], sources: list[str], targets: int) -> Reader:
    def extend(x: Value, bits: Value) -> Value:
        low = x & ((1 << bits) - 1)
        return low if "U32" in words else signed(low, bits) & MASK

    return _known(extend, *map(threads.reader, sources[:2]))


def _permute(threads: Threads, words: list[str], sources: list[str], targets: int) -> Reader:
    def permute(x: Value, selector: Value, y: Value) -> Value:
        both, total = np.asarray(x, np.int64) | np.asarray(y, np.int64) << 32, np.asarray(0)
        for n in range(4):
            total = total | (both >> 8 * (selector >> 4 * n & 7) & 255) << 8 * n
        return total

    return _known(permute, *map(threads.reader, sources[:3]))


def _predicates_to_register(threads: Threads, words: list[str], sources: list[str], targets: int) -> Reader:
    mask, shift = int(sources[2], 16), 8 * int(words[1][1]) if len(words) > 1 and words[1][0] == "B" else 0
    bits = [(n, threads.reader(f"P{n}")) for n in range(7) if mask >> n & 1]
    rest = threads.reader(sources[1])

    def gather() -> Value:
        total = rest()
        for n, read in bits:
            x = read()
            if x is None or total is None:
                return None
            total = total & ~(1 << n + shift) | np.asarray(x + 0, np.int64) << n + shift
        return total

    return gather


def _float(how: Callable[[Any], Any]) -> Callable[..., Reader]:
    """Divisions of integers go through floats."""

    def rule(threads: Threads, words: list[str], sources: list[str], targets: int) -> Reader:
        if words[0] == "MUFU" and words[1] != "RCP":
            return lambda: None
        return _known(lambda x: how(np.asarray(x)), threads.reader(sources[0]))

    return rule


def _bits(x: Any) -> Any:
    return np.asarray(x, np.float32).view(np.uint32).astype(np.int64)


def _number(x: Any) -> Any:
    return np.asarray(x).astype(np.uint32).view(np.float32)


def _simple(function: Callable[..., Any], count: int) -> Callable[..., Reader]:
    def rule(threads: Threads, words: list[str], sources: list[str], targets: int) -> Reader:
        return _known(function, *map(threads.reader, sources[:count]))

    return rule


def _constant(threads: Threads, words: list[str], sources: list[str], targets: int) -> Reader:
    if not re.match(r"c\[0x0\]\[0x[0-9a-f]+\]$", sources[0]):
        return lambda: None
    return (threads.wide_reader if "64" in words else threads.reader)(sources[0])


def _special(threads: Threads, words: list[str], sources: list[str], targets: int) -> Reader:
    return lambda: threads.special.get(sources[0], 0)


def _shuffle(threads: Threads, words: list[str], sources: list[str], targets: int) -> Reader:
    def of_lane(x: Value, by: Value) -> Value:
        x = np.asarray(x)
        if x.ndim == 0 or words[1] != "IDX":
            return x if x.ndim == 0 else None
        by = np.broadcast_to(by, x.shape).reshape(-1, 32) & 31
        return np.take_along_axis(x.reshape(-1, 32), by, 1).reshape(-1)

    return _known(of_lane, *map(threads.reader, sources[:2]))


RULES: dict[str, Callable[..., Reader]] = {
    "MOV": _simple(lambda x: x, 1),
    "IADD3": _add,
    "VIADD": _simple(lambda x, y: (x + y) & MASK, 2),
    "IMAD": _multiply,
    "LEA": _lea,
    "LOP3": _logic,
    "PLOP3": _logic_of_predicates,
    "SHF": _shift,
    "ISETP": _compare,
    "SEL": _select,
    "VIMNMX": _extreme,
    "IMNMX": _extreme,
    "VIADDMNMX": _extreme,
    "SGXT": _extend,
    "PRMT": _permute,
    "P2R": _predicates_to_register,
    "IABS": _simple(lambda x: np.abs(signed(np.asarray(x))), 1),
    "I2F": _float(lambda x: _bits(x)),
    "MUFU": _float(lambda x: _bits(1 / _number(x))),
    "F2I": _float(lambda x: _number(x).astype(np.int64) & MASK),
    "LDC": _constant,
    "S2": _special,
    "CS2R": _simple(lambda: 0, 0),
    "SHFL": _shuffle,
}
