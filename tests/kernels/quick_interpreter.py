"""Triton's interpreter in a third to a half of the time, for tests of kernels: what it computes is not touched.

Most of its time is bookkeeping that it does again for every call. It looks through its language for what to replace on
every call of a device function; it builds a table of dtypes for every cast, and a type with its name for every shape.
It also adds and multiplies every index a second time in int64, to see it overflow, which at the sizes of tests none
can: ``test_far_offsets.py`` leaves that as it is.

What another version of Triton has not, or has otherwise, stays as it is there: then tests take longer.
"""

from __future__ import annotations

import dataclasses
import types
from typing import Any


def install(*, watch_overflow: bool = False) -> None:
    """Replace the bookkeeping, in a process that interprets; once."""
    import triton.language as tl
    from triton.runtime import interpreter

    expected = {
        interpreter: ("_patch_lang", "_get_np_dtype", "interpreter_builder"),
        tl.core.tuple: ("__init__",),
        tl.core.tensor: ("__init__",),
        tl.core.block_type: ("__init__", "get_block_shapes"),
        interpreter.TritonSemantic: ("broadcast_impl_value",),
    }
    if any(not hasattr(owner, name) for owner, names in expected.items() for name in names):
        return
    if not watch_overflow:
        builder = interpreter.interpreter_builder
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter._get_np_dtype = _remembered(interpreter._get_np_dtype)
    interpreter._patch_lang = _outermost_only(interpreter._patch_lang, tl)
    _name_types_when_asked(tl.core.tuple)
    _make_types_of_blocks_once(tl.core.block_type)
    _make_shapes_once(tl.core.tensor)
    _leave_equal_shapes(interpreter.TritonSemantic)


def _remembered(dtype_of: Any) -> Any:
    """By the name of a type's elements: types of blocks and pointers have no hash."""
    known: dict[str, Any] = {}

    def remembered(kind: Any) -> Any:
        name = kind.scalar.name
        if name not in known:
            known[name] = dtype_of(kind)
        return known[name]

    return remembered


def _outermost_only(patch_lang: Any, tl: Any) -> Any:
    """The language is replaced where a kernel is launched, for all device functions that it calls, too."""
    every = types.FunctionType((lambda: None).__code__, {"tl": tl, "core": tl.core})
    active = False

    class Scope:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def restore(self) -> None:
            nonlocal active
            self.inner.restore()
            active = False

    def patched(fn: Any) -> Any:
        nonlocal active
        if active:
            return None
        scope = Scope(patch_lang(every))
        active = True
        return scope

    return patched


def _name_types_when_asked(kind: Any) -> None:
    """A tuple makes its type, with a name of all its values, when somebody looks at it: at that of a shape nobody."""
    made = kind.__init__

    def __init__(self: Any, args: Any, type: Any = None) -> None:
        if type is None:
            self.values = list(args)
            self.__dict__["_type"] = None
        else:
            made(self, args, type)

    def get(self: Any) -> Any:
        if self.__dict__["_type"] is None:
            import triton.language as tl

            self.__dict__["_type"] = tl.core._type_for_tuple_values(self.values)
        return self.__dict__["_type"]

    def put(self: Any, value: Any) -> None:
        self.__dict__["_type"] = value

    kind.__init__ = __init__
    kind.type = property(get, put)


def _make_types_of_blocks_once(kind: Any) -> None:
    made = kind.__init__
    known: dict[Any, dict[str, Any]] = {}

    def __init__(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *(getattr(size, "value", size) for size in shape))
        if key not in known:
            made(self, element_ty, shape)
            known[key] = dict(self.__dict__)
        self.__dict__.update(known[key])

    kind.__init__ = __init__


def _make_shapes_once(kind: Any) -> None:
    """Of tensors, by the name of their type."""
    made = kind.__init__
    known: dict[str, dict[str, Any]] = {}

    def __init__(self: Any, handle: Any, type: Any) -> None:
        if type.name not in known:
            made(self, None, type)
            known[type.name] = {"shape": self.shape, "numel": self.numel}
        self.__dict__.update(known[type.name])
        self.handle, self.type, self.dtype = handle, type, type.scalar

    kind.__init__ = __init__


def _leave_equal_shapes(semantic: Any) -> None:
    broadcast = semantic.broadcast_impl_value

    def broadcast_impl_value(self: Any, lhs: Any, rhs: Any) -> Any:
        one, other = lhs.type, rhs.type
        if one.is_block():
            if other.is_block() and one.shape.values == other.shape.values:
                return lhs, rhs
        elif not other.is_block():
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    semantic.broadcast_impl_value = broadcast_impl_value
