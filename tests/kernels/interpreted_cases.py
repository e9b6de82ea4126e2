"""What modules of cases for Triton's interpreter share; run_interpreted.py runs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Errors = dict[str, float]
"""Of each result."""


class Cases(dict[str, Callable[[], Any]]):
    """Calls that return errors, by name."""

    def add[F: Callable[..., Any]](self, name: str, *args: Any, **kwargs: Any) -> Callable[[F], F]:
        """A decorator: the case of this name calls the function with these arguments."""

        def decorate(function: F) -> F:
            assert name not in self
            self[name] = lambda: function(*args, **kwargs)
            return function

        return decorate

    def run(self, name: str) -> Any:
        return self[name]()
