"""A profile knows a kernel by its name alone (linear_moe/bench/breakdown.py): no two have one name."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from linear_moe.kernels import triton as package

KERNEL = re.compile(r"^@triton\.jit.*\n(?:@.*\n)*def (\w+_kernel)\(", re.MULTILINE)


def test_names_are_unique() -> None:
    files = defaultdict(list)
    for source in Path(package.__file__).parent.glob("*.py"):
        for name in KERNEL.findall(source.read_text()):
            files[name].append(source.name)
    assert len(files) > 50
    assert not {name: found for name, found in files.items() if len(found) > 1}
