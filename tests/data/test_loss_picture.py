"""tools/plot_loss.py: which points and lines are in the picture of a run's loss."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tools import plot_loss


def drawn(tmp_path: Path, records: list[dict[str, Any]], data: str | None = None) -> Any:
    """The axes of the picture."""
    found: list[Any] = []
    make = plot_loss.plt.subplots

    def subplots(**options: Any) -> Any:
        found.append(make(**options))
        return found[0]

    with patch.object(plot_loss.plt, "subplots", subplots):
        plot_loss.draw(tmp_path / "demo" / "metrics.jsonl", records, data, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    return found[0][1]


def points(line: Any) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in line.get_xydata()]


def test_losses_stand_over_the_tokens_read(tmp_path: Path):
    """Batches may grow; an evaluation stands where its step does, one of a step that is not there nowhere."""
    records: list[dict[str, Any]] = [
        {"iteration": 1, "lm_loss": 8.0, "tokens": 1_000_000},
        {"iteration": 2, "lm_loss": 4.0, "tokens": 3_000_000},
        {"iteration": 2, "validation_loss": 5.0},
        {"iteration": 3, "lm_loss": 2.0, "tokens": 500_000},
        {"iteration": 9, "validation_loss": 1.0},
    ]
    axes = drawn(tmp_path, records)
    steps, average, held_out = axes.lines
    assert points(steps) == [(1.0, 8.0), (4.0, 4.0), (4.5, 2.0)]
    assert points(held_out) == [(4.0, 5.0)]
    # weights 0.95^2, 0.95 and 1 of the last three losses, and so on
    assert [y for _, y in points(average)] == pytest.approx([8.0, (0.95 * 8 + 4) / 1.95, 13.02 / 2.8525])
    assert axes.get_title() == "demo: 8.00 to 4.56 in 3 steps"
    assert len(drawn(tmp_path, records[:2]).lines) == 2


def test_the_entropy_of_tokens_is_a_line(tmp_path: Path):
    with patch.object(plot_loss, "unigram_entropy", lambda prefix: {"p": 6.5}[prefix]):
        axes = drawn(tmp_path, [{"iteration": 1, "lm_loss": 8.0, "tokens": 2_000_000}], "p")
    assert set(axes.lines[-1].get_ydata()) == {6.5}
    (text,) = axes.texts
    assert text.get_text() == "token frequencies alone: 6.50" and text.get_position() == (2.0, 6.5)


def test_a_picture_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1, "lm_loss": 8.0, "tokens": 9}\n')
    with patch("sys.argv", ["plot_loss.py", str(tmp_path), "--output", "/nowhere/a.png"]):
        assert plot_loss.main() == 2
    assert capsys.readouterr().err.startswith(
        "linear_moe: /nowhere/a.png cannot be written\n  why: No such file"
    )
