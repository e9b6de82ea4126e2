"""Where each tensor of an imported model came from, as a table for people."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass
class Origin:
    """Tensors that differ in their layer only."""

    pattern: str
    """Our key, a star for the layer."""
    how: str
    """carried or started."""
    source: str
    """From what: names of Hugging Face with a star for layer and expert, or words."""
    layers: list[int]
    count: int = 0
    """How many tensors."""

    @classmethod
    def note(cls, found: dict[str, Origin], key: str, how: str, source: str) -> None:
        """Count one tensor."""
        numbers = re.findall(r"\.layers\.(\d+)\.", key)
        pattern, source = _starred(key), _starred(source)
        origin = found.setdefault(f"{pattern} {how} {source}", cls(pattern, how, source, []))
        origin.count += 1
        if numbers and int(numbers[0]) not in origin.layers:
            origin.layers.append(int(numbers[0]))


def _starred(text: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", text)


def origin_table(origins: Iterable[Origin], num_layers: int) -> str:
    """Lines of four columns: tensor, layers, carried or started, from what."""
    lines = [("tensor", "layers", "", "from")]
    for origin in origins:
        name = origin.pattern.removeprefix("decoder.layers.*.")
        lines.append((name, _ranges(origin.layers, num_layers), origin.how, origin.source))
    widths = [max(len(line[i]) for line in lines) for i in range(3)]
    return "\n".join(
        "  ".join([*(text.ljust(width) for text, width in zip(line, widths, strict=False)), line[3]]).rstrip()
        for line in lines
    )


def origin_counts(origins: Iterable[Origin]) -> str:
    """One line instead of the table, for a model that stays as it is: how many were carried and started."""
    counts = {"carried": 0, "started": 0}
    for origin in origins:
        counts[origin.how] += origin.count
    return "tensors: " + ", ".join(f"{count} {how}" for how, count in counts.items())


def _ranges(layers: list[int], num_layers: int) -> str:
    """``0-2 4-6``; empty for what belongs to no layer."""
    if len(layers) == num_layers and num_layers > 1:
        return "all"
    spans: list[list[int]] = []
    for layer in sorted(layers):
        if spans and spans[-1][1] == layer - 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return " ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
