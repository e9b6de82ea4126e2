"""A line of Python, or a few, for every instruction of PTX: it works on the registers of all threads.

It knows the instructions that Triton 3.6 makes of the kernels here, for sm_80 to sm_90 and sm_120; another one is an
error, not a guess.
"""

from __future__ import annotations

import re

import numpy as np

from emulator import numbers
from emulator.numbers import size_of

COMPARISONS = {
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "eq": "==",
    "ne": "!=",
    "lo": "<",
    "ls": "<=",
    "hi": ">",
}
WHOLE = {"rzi": "np.trunc", "rni": "np.rint", "rmi": "np.floor", "rpi": "np.ceil"}
"""What conversions to whole numbers make of a fraction."""
OPERATORS = {"add": "+", "sub": "-", "and": "&", "or": "|", "xor": "^"}
FUNCTIONS = {
    "abs": "np.abs({0})",
    "not": "~{0}",
    "neg": "-{0}",
    "ex2": "np.exp2({0})",
    "lg2": "np.log2({0})",
    "sqrt": "np.sqrt({0})",
    "rcp": "1 / {0}",
    "rsqrt": "1 / np.sqrt({0})",
    "rem": "remainder({0}, {1})",
}


def _operands(text: str) -> list[str]:
    """Split at commas outside of brackets."""
    return [x.strip() for x in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text)]


def _parts(operand: str) -> list[str]:
    return [x.strip() for x in operand[1:-1].split(",")] if operand.startswith("{") else [operand]


class Writer:
    """Lines of Python for instructions."""

    def __init__(self, labels: dict[str, int]) -> None:
        self._labels, self.registers = labels, set[str]()

    def lines(self, text: str, where: str) -> list[str]:
        """Of one instruction."""
        guard = None
        if found := re.match(r"@(!?)(%\w+)\s+", text):
            guard = self._register(found[2])
            guard = f"~np.asarray({guard})" if found[1] else guard
            text = text[found.end() :]
        name, _, rest = text.replace("\t", " ").partition(" ")
        operands, words = _operands(rest), name.split(".")
        if words[0] == "bra":
            jump = f"pc = {self._labels[operands[0]]}; continue"
            return [jump] if guard is None else [f"if m.is_taken({guard}):", f"  {jump}"]
        if words[0] == "ret":
            return ["return"]
        special = self._special(name, words, operands, guard, repr(f"{where} {name}"))
        return special if special is not None else self._arithmetic(name, words, operands, guard)

    def _register(self, operand: str) -> str:
        name = "v_" + re.sub(r"\W", "_", operand.strip().lstrip("%"))
        self.registers.add(name)
        return name

    def _bits(self, operand: str, size: int) -> str:
        """An operand's bits."""
        operand = operand.strip()
        unsigned = f"np.uint{8 * size}"
        if found := re.match(r"%(n?)ctaid\.([xyz])", operand):
            return f"np.uint32(m.{'grid' if found[1] else 'place'}[{'xyz'.index(found[2])}])"
        if operand.startswith("%tid."):
            return "m.thread" if operand.endswith("x") else "np.uint32(0)"
        if operand.startswith("%"):
            return f"cut({self._register(operand)}, {size})" if size > 1 else self._register(operand)
        if operand.startswith("0f"):
            return f"np.uint32(0x{operand[2:]})"
        if operand.startswith("0d"):
            return f"np.uint64(0x{operand[2:]})"
        if operand == "global_smem":
            return f"{unsigned}(0)"
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", operand):
            return f"{unsigned}({int(operand.rstrip('U'), 0) & (1 << 8 * size) - 1})"
        if re.fullmatch(r"[A-Za-z_]\w*", operand):  # a register of inline assembly
            return f"cut({self._register(operand)}, {size})"
        raise NotImplementedError(operand)

    def _value(self, operand: str, kind: str) -> str:
        """An operand as a number."""
        if kind == "pred":
            if re.fullmatch(r"-?\d+", operand):
                return str(operand != "0")
            return f"np.asarray({self._register(operand)})"
        size = 2 if kind in ("f16", "bf16") else size_of(kind)
        return f"as_type({self._bits(operand, size)}, {kind!r})"

    def _set(self, target: str, bits: str, guard: str | None) -> list[str]:
        if target.strip() == "_":
            return []
        register = self._register(target)
        return [f"{register} = {bits if guard is None else f'np.where({guard}, {bits}, {register})'}"]

    def _set_value(self, target: str, value: str, kind: str, guard: str | None) -> list[str]:
        return self._set(target, value if kind == "pred" else f"as_bits({value}, {kind!r})", guard)

    def _address(self, operand: str, size: int) -> str:
        found = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand)
        assert found is not None, operand
        offset = int(found[2] or "0", 0) & (1 << 8 * size) - 1
        return f"({self._bits(found[1], size)} + np.uint{8 * size}({offset}))"

    def _list(self, operand: str, size: int = 4) -> str:
        return "[" + ", ".join(self._bits(x, size) for x in _parts(operand)) + "]"

    def _special(
        self, name: str, words: list[str], operands: list[str], guard: str | None, where: str
    ) -> list[str] | None:
        """What touches memory or other threads; ``None`` for anything else."""
        simple = {
            "bar.sync": "m.shared.barrier += 1",
            "bar.warp.sync": "m.shared.barrier_of_warp += 1",
            "fence.proxy": "m.shared.is_unfenced[:] = False",
            "wgmma.fence": "pass",
            "wgmma.commit": "m.commit_products()",
            "wgmma.wait": f"m.wait_for_products({operands[0] if operands else 0})",
            "cp.async.commit": "m.commit_copies()",
            "cp.async.wait_group": f"m.wait_for_copies({operands[0] if operands else 0})",
        }
        for prefix, line in simple.items():
            if name.startswith(prefix):
                return [line]
        if words[0] in ("ld", "st"):
            return self._load_or_store(words, operands, guard, where)
        if name.startswith("cp.async"):
            target, source = self._address(operands[0], 4), self._address(operands[1], 8)
            taken = self._bits(operands[3], 4) if len(operands) > 3 else operands[2]
            return [f"m.copy({target}, {source}, {int(operands[2], 0)}, {taken}, {where}, {guard or True})"]
        if words[0] in ("ldmatrix", "stmatrix", "mma", "wgmma"):
            return self._matrices(name, words, operands, where)
        if words[0] == "shfl":
            target = operands[0].split("|")[0]
            bits = f"m.shuffle({words[2]!r}, {self._bits(operands[1], 4)}, {self._bits(operands[2], 4)})"
            return self._set(target, bits, guard)
        if words[0] == "redux":
            return self._set(
                operands[0], f"m.reduce({words[2]!r}, {self._value(operands[1], words[-1])})", guard
            )
        return None

    def _load_or_store(
        self, words: list[str], operands: list[str], guard: str | None, where: str
    ) -> list[str]:
        size = size_of(words[-1])
        if words[1] == "param":
            found = re.fullmatch(r"\[(\w+)\]", operands[1])
            assert found is not None
            bits = f"parameters[{found[1]!r}]"
            if operands[0].startswith("%rd") and size == 4:
                wide = (
                    "as_bits(as_type({0}, 's32').astype(np.int64), 's64')"
                    if words[-1] == "s32"
                    else "np.uint64({0})"
                )
                bits = wide.format(bits)
            return self._set(operands[0], bits, None)
        space = words[1].split("::")[0]
        is_load = words[0] == "ld"
        address = self._address(operands[is_load], 4 if space == "shared" else 8)
        parts = _parts(operands[not is_load])
        if not is_load:
            values = self._list(operands[1], size)
            return [f"m.store({space!r}, {address}, {size}, {values}, {where}, {guard or True})"]
        lines = [f"loaded = m.load({space!r}, {address}, {size}, {len(parts)}, {where}, {guard or True})"]
        for n, part in enumerate(parts):
            bits = f"loaded[{n}].astype(np.uint16)" if size == 1 else f"loaded[{n}]"
            lines += self._set(part, bits, guard)
        return lines

    def _matrices(self, name: str, words: list[str], operands: list[str], where: str) -> list[str]:
        transposed = "trans" in words
        if words[0] == "stmatrix":
            values = self._list(operands[1])
            return [f"m.store_matrices({transposed}, {self._address(operands[0], 4)}, {values}, {where})"]
        targets = ", ".join(self._register(x) for x in _parts(operands[0])) + ","
        if words[0] == "ldmatrix":
            count = len(_parts(operands[0]))
            return [
                f"{targets} = m.load_matrices({count}, {transposed}, {self._address(operands[1], 4)}, {where})"
            ]
        if words[0] == "mma":
            found = re.search(r"m16n8k(\d+)", name)
            assert found is not None
            factors = ", ".join(self._list(x) for x in operands[1:])
            return [f"{targets} = m.multiply({found[1]}, {words[-2]!r}, {factors})"]
        is_register = operands[1].startswith("{")
        a = self._list(operands[1]) if is_register else self._bits(operands[1], 8)
        assert operands[4:6] == ["1", "1"], "a factor of -1"
        if words[-1] == "tf32":
            order = "(False, False)"
        elif is_register:
            order = f"(False, {operands[6]} == 1)"
        else:
            order = f"({operands[6]} == 1, {operands[7]} == 1)"
        b, adds = self._bits(operands[2], 8), self._value(operands[3], "pred")
        return [
            f"{targets} = m.multiply_async({words[-1]!r}, [{targets}], {a}, {b}, {adds}, {order}, {where})"
        ]

    def _arithmetic(self, name: str, words: list[str], operands: list[str], guard: str | None) -> list[str]:
        """What a thread does alone."""
        what, kind = words[0], words[-1]
        if what == "mov":
            return self._move(kind, operands, guard)
        if what == "setp":
            return self._compare(words[1], kind, operands)
        if what == "cvt":
            return self._convert(words, operands, guard)
        if kind in ("bf16x2", "f16x2", "f32x2"):
            return self._two_halves(what, kind.removesuffix("x2"), operands, guard)
        if what == "selp":
            size, condition = size_of(kind), self._value(operands[3], "pred")
            bits = f"np.where({condition}, {self._bits(operands[1], size)}, {self._bits(operands[2], size)})"
            return self._set(operands[0], bits, guard)
        if what == "prmt":
            return self._set(
                operands[0], f"permute_bytes({', '.join(self._bits(x, 4) for x in operands[1:])})", guard
            )
        if what == "shf":
            shifted = f"funnel({', '.join(self._bits(x, 4) for x in operands[1:])}, {words[1] == 'l'})"
            return self._set(operands[0], shifted, guard)
        if what in ("shl", "shr"):
            value, count = self._value(operands[1], kind), self._bits(operands[2], 4)
            return self._set_value(operands[0], f"shift({value}, {count}, {what == 'shl'})", kind, guard)
        if what in ("bfe", "bfi"):
            fields = [self._value(x, kind) for x in operands[1:-2]] + [
                self._bits(x, 4) for x in operands[-2:]
            ]
            function = "bit_field" if what == "bfe" else "insert_field"
            return self._set_value(operands[0], f"{function}({', '.join(fields)})", kind, guard)
        if "wide" in words:
            wide = f"{kind[0]}{2 * int(kind[1:])}"
            a, b = (
                f"as_type({x}.astype(np.{_name(wide)}), {wide!r})" for x in self._values(operands[1:3], kind)
            )
            total = f"{a} * {b}" + (f" + {self._value(operands[3], wide)}" if what == "mad" else "")
            return self._set_value(operands[0], total, wide, guard)
        return self._set_value(
            operands[0], self._expression(words, self._values(operands[1:], kind)), kind, guard
        )

    def _values(self, operands: list[str], kind: str) -> list[str]:
        return [self._value(x, kind) for x in operands]

    def _expression(self, words: list[str], x: list[str]) -> str:
        what, kind = words[0], words[-1]
        is_float = kind[0] == "f" or kind == "bf16"
        if what in OPERATORS:
            return f"{x[0]} {OPERATORS[what]} {x[1]}"
        if what in FUNCTIONS:
            return FUNCTIONS[what].format(*x)
        if what in ("mul", "mad", "fma"):
            if "hi" in words:
                wide, bits = f"np.{_name(kind[0] + str(2 * int(kind[1:])))}", int(kind[1:])
                return f"(({x[0]}.astype({wide}) * {x[1]}.astype({wide})) >> {wide}({bits})).astype(np.{_name(kind)})"
            if what == "fma" and kind == "f32":
                return f"({x[0]}.astype(np.float64) * {x[1]} + {x[2]}).astype(np.float32)"
            return f"{x[0]} * {x[1]}" + (f" + {x[2]}" if len(x) > 2 else "")
        if what == "div":
            return f"{x[0]} / {x[1]}" if is_float else f"divide({x[0]}, {x[1]})"
        if what in ("min", "max"):
            function = f"np.f{what}" if is_float and "NaN" not in words else f"np.{what}imum"
            found = f"{function}({x[0]}, {x[1]})"
            return f"np.maximum({found}, 0)" if "relu" in words else found
        raise NotImplementedError(".".join(words))

    def _move(self, kind: str, operands: list[str], guard: str | None) -> list[str]:
        target, source = operands
        if kind == "pred":
            return self._set(target, self._value(source, "pred"), guard)
        size = size_of(kind)
        if target.startswith("{"):
            parts = _parts(target)
            part, lines = size // len(parts), []
            for n, x in enumerate(parts):
                bits = f"({self._bits(source, size)} >> np.uint{8 * size}({8 * part * n})).astype(np.uint{8 * part})"
                lines += self._set(x, bits, guard)
            return lines
        parts = _parts(source)
        part, wide = size // len(parts), f"np.uint{8 * size}"
        shifted = (
            f"(cut({self._bits(x, part)}, {size}) << {wide}({8 * part * n}))" for n, x in enumerate(parts)
        )
        return self._set(target, " | ".join(shifted) if len(parts) > 1 else self._bits(source, size), guard)

    def _compare(self, how: str, kind: str, operands: list[str]) -> list[str]:
        if kind in ("bf16x2", "f16x2"):
            lines = []
            for n, target in enumerate(operands[0].split("|")):
                a, b = (f"as_type(halves({self._bits(x, 4)})[{n}], {kind[:-2]!r})" for x in operands[1:])
                lines += self._set(target, f"{a} {COMPARISONS[how]} {b}", None)
            return lines
        a, b = self._values(operands[1:], kind)
        unordered = f"np.isnan({a}) | np.isnan({b})"
        if how in ("num", "nan"):
            return self._set(operands[0], f"~({unordered})" if how == "num" else unordered, None)
        if how.endswith("u") and kind[0] in "fb":
            return self._set(operands[0], f"({a} {COMPARISONS[how[:-1]]} {b}) | {unordered}", None)
        return self._set(operands[0], f"{a} {COMPARISONS[how]} {b}", None)

    def _convert(self, words: list[str], operands: list[str], guard: str | None) -> list[str]:
        target, source = words[-2:]
        if target in ("bf16x2", "f16x2"):
            high, low = (f"as_bits({self._value(x, 'f32')}, {target[:-2]!r})" for x in operands[1:])
            return self._set(operands[0], f"joined({low}, {high})", guard)
        value = self._value(operands[1], source)
        if target == "tf32":
            return self._set(operands[0], f"to_tf32({value})", guard)
        for word in WHOLE.keys() & set(words):
            value = f"{WHOLE[word]}({value})"
        number = "float32" if target in ("bf16", "f16") else _name(target)
        return self._set_value(operands[0], f"np.asarray({value}).astype(np.{number})", target, guard)

    def _two_halves(self, what: str, kind: str, operands: list[str], guard: str | None) -> list[str]:
        size = 8 if kind == "f32" else 4
        found = []
        for n in range(2):
            parts = (f"({self._bits(x, size)} >> np.uint{8 * size}({4 * size * n}))" for x in operands[1:])
            values = [f"as_type({part}, {kind!r})" for part in parts]
            found.append(f"cut(as_bits({self._expression([what, kind], values)}, {kind!r}), {size})")
        return self._set(operands[0], f"{found[0]} | ({found[1]} << np.uint{8 * size}({4 * size}))", guard)


def _name(kind: str) -> str:
    """Of the type in numpy."""
    return np.dtype(numbers.TYPES[kind]).name
