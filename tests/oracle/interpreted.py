"""Layers of flash-linear-attention as they are, Triton kernels and all, in Triton's interpreter on a CPU in float32.

Run as a program, in a process of its own: the interpreter is switched on for a whole process before Triton is imported.

    python -m tests.oracle.interpreted <file for the results> <case> ..
"""

from __future__ import annotations

import builtins
import os
import sys
from typing import Any

import torch


def interpret() -> None:
    """Make fla 0.6.0 run in the interpreter of Triton 3.6 (with numpy below 2.4)."""
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language as tl
    from triton.runtime import autotuner, interpreter

    from tests.kernels import quick_interpreter

    quick_interpreter.install()
    # Nothing to measure: the first configuration wins.
    autotuner.Autotuner._bench = lambda self, *args, config, **kwargs: [0.0, 0.0, 0.0]

    def tensor_range(*bounds: Any) -> Any:
        """Loop indices as the compiler makes them, if a bound is one: kernels call ``.to`` on them."""
        if any(isinstance(bound, tl.tensor) for bound in bounds):
            return (interpreter._implicit_cvt(i) for i in builtins.range(*bounds))
        return builtins.range(*bounds)

    launch = interpreter.GridExecutor.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        names = self.fn.__globals__
        names.setdefault("range", tensor_range)
        if "gather" in names:  # an alias that the interpreter does not bind anew
            names["gather"] = lambda *args, **kwargs: tl.gather(*args, **kwargs)
        return launch(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = call


def run(name: str) -> dict[str, torch.Tensor]:
    """Output and gradients of a case's layer, by name."""
    from tests.oracle.exchange import theirs
    from tests.oracle.test_oracle_fla import CASES

    return theirs(CASES[name], dtype=torch.float32, plain=True)


if __name__ == "__main__":
    interpret()
    torch.save({name: run(name) for name in sys.argv[2:]}, sys.argv[1])
