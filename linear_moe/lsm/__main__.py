"""``python -m linear_moe.lsm``: every registered mixer, what it remembers, where it comes from, which layouts it takes;
``python -m linear_moe.lsm gla``: the options of one.

The figures are those of a model of 1024 channels with 8 heads of 128, every option at its default. A mixer takes every
layout, since layouts follow from its contract; one that cannot says so in ``Mixer.unsupported``, and is refused there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import textwrap
from dataclasses import dataclass

from linear_moe import lsm
from linear_moe.lsm.flags import flag_of, options_of
from linear_moe.lsm.registry import import_mixers
from linear_moe.lsm.tables import LAYOUTS

HIDDEN, HEADS, HEAD_DIM = 1024, 8, 128
"""Shape of the model that the figures are for."""

WIDTH = 160
"""Characters of a line."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What the list says of one mixer."""

    name: str
    """As LA_MODULE spells it."""
    family: str
    """Its recurrence."""
    heads: int
    """Heads of its layer in the model of the figures."""
    memory_shapes: tuple[tuple[int, int], ...]
    """Key and value dims of each matrix memory of a head."""
    elements: int
    """Numbers that one head remembers of a sequence, short convolution and token shift aside."""
    unsupported: dict[str, str]
    """Layouts it cannot take, and why."""
    source: str
    """Paper and section."""

    @property
    def memory(self) -> str:
        """``4 x 64x128 + 128x128``: equal neighbours counted."""
        groups = [(shape, len(list(same))) for shape, same in itertools.groupby(self.memory_shapes)]
        return " + ".join(f"{f'{n} x ' if n > 1 else ''}{k}x{v}" for (k, v), n in groups)

    @property
    def layouts(self) -> str:
        """``all``, or ``all but CP, decode``."""
        return f"all but {', '.join(self.unsupported)}" if self.unsupported else "all"


def entries() -> list[Entry]:
    """Every registered mixer, by name."""
    return [entry(name) for name in lsm.names()]


def entry(name: str) -> Entry:
    """What the registered mixer ``name`` says of itself at its defaults."""
    mixer_class = lsm.get(name)
    mixer = mixer_class(mixer_class.Config.from_model(hidden_size=HIDDEN, num_heads=HEADS, head_dim=HEAD_DIM))
    return Entry(
        name=name,
        family=mixer.family,
        heads=mixer.cfg.num_heads,
        memory_shapes=mixer.memory_shapes(),
        elements=sum(k * v for k, v in mixer.memory_shapes()),
        unsupported=dict(mixer.unsupported),
        source=mixer.source,
    )


def table(found: list[Entry]) -> str:
    """One aligned line per mixer (its source may take more), a heading above, exceptions below."""
    heading = ["mixer", "family", "heads", "memory per head", "elements", "layouts"]
    rows = [[e.name, e.family, str(e.heads), e.memory, f"{e.elements:,}", e.layouts] for e in found]
    widths = [max(map(len, column)) for column in zip(heading, *rows, strict=True)]

    def line(cells: list[str], source: str) -> str:
        padded = [
            cell.rjust(width) if name in ("heads", "elements") else cell.ljust(width)
            for name, cell, width in zip(heading, cells, widths, strict=True)
        ]
        start = "  ".join(padded) + "  "
        first, *rest = textwrap.wrap(source, max(WIDTH - len(start), 20)) or [""]
        return "\n".join([start + first, *(" " * len(start) + more for more in rest)])

    lines = [line(heading, "source"), *(line(row, e.source) for row, e in zip(rows, found, strict=True))]
    lines += ["", *_notes(found)]
    return "\n".join(text.rstrip() for text in "\n".join(lines).split("\n"))


def _notes(found: list[Entry]) -> list[str]:
    figures = (
        f"Figures: {HIDDEN} channels, {HEADS} heads of {HEAD_DIM}, default options; memories are float32, "
        f"of the same size after any number of tokens."
    )
    names = "; ".join(f"{layout} {meaning}" for layout, meaning in LAYOUTS.items())
    notes = [figures, f"All layouts: {names}."]
    notes += [f"{e.name}, {layout}: {why}" for e in found for layout, why in e.unsupported.items()]
    return [part for note in notes for part in textwrap.wrap(note, WIDTH, subsequent_indent="  ")]


def options(name: str) -> str:
    """The flags of a mixer, which ``EXTRA_ARGS`` takes, each with its meaning and its default."""
    flags = {flag_of(name, field): text for field, _, text in options_of(lsm.get(name).Config)}
    width = max(map(len, flags)) + 4
    lines = [f"{name} ({lsm.get(name).source})"]
    for flag, text in flags.items():
        first, *rest = textwrap.wrap(text, WIDTH - width) or [""]
        lines += [f"  {flag}".ljust(width) + first, *(" " * width + more for more in rest)]
    return "\n".join(lines)


def as_json(found: list[Entry]) -> str:
    """The same, for programs."""
    rows = [
        vars(e) | {"layouts": [layout for layout in LAYOUTS if layout not in e.unsupported]} for e in found
    ]
    return json.dumps(rows, indent=2)


def main(argv: list[str]) -> int:
    """Write the list; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m linear_moe.lsm", description="List the token mixers.")
    parser.add_argument("mixer", nargs="*", help="show the options of these, and their defaults")
    parser.add_argument("--json", action="store_true", help="the list as JSON")
    parser.add_argument("--mixer-module", default="", help="modules with more mixers, comma separated")
    args = parser.parse_args(argv)
    try:
        import_mixers(args.mixer_module)
        chosen = {name: lsm.get(name) for name in args.mixer}
    except ValueError as error:
        sys.stderr.write(f"linear_moe: {error}\n")
        return 2
    found = [entry(name) for name in chosen] or entries()
    text = as_json(found) if args.json else "\n\n".join(map(options, chosen)) or table(found)
    sys.stdout.write(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
