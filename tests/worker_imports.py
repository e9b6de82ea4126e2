"""What a worker process of ``tests/workers.py`` has imported when it starts; ``pretrain`` turns on the CPU platform."""

from typing import Any

import linear_moe.inference.load
import linear_moe.model.builder
import linear_moe.training.pretrain  # noqa: F401

# isort: split
from megatron.training.argument_utils import ArgumentGroupFactory

read_help, known = ArgumentGroupFactory._get_field_docstrings, {}


def remember_help(factory: Any, config: type) -> dict[str, str]:
    """Texts of ``--help``, which every parser of a command line takes out of Megatron's sources: once will do."""
    if config not in known:
        known[config] = read_help(factory, config)
    return known[config]


ArgumentGroupFactory._get_field_docstrings = remember_help
