"""Plot of gaps: a panel for each number of gaps, a line for each arm and reading, error bars of one standard error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from ul2r.evaluation.gaps import plot
from ul2r.evaluation.gaps.plot import plot_gaps
from ul2r.evaluation.gaps.readings import Reading
from ul2r.evaluation.gaps.scores import GapScores
from ul2r.evaluation.plot import save_figure


def make_scores(length: int, slots: int, reading: Reading, loss: float) -> GapScores:
    """Return scores of four texts, whose losses are `loss` minus and plus 0.5."""
    shape = (4, slots, length)
    signs = np.array([-1.0, 1.0, -1.0, 1.0])[:, None, None]
    return GapScores(
        length=length,
        slots=slots,
        reading=reading,
        hashes=("a", "b", "c", "d"),
        origins=np.zeros(shape, np.int8),
        losses=np.broadcast_to(loss + 0.5 * signs, shape).astype(np.float64),
        is_most_likely=np.zeros(shape, bool),
        targets=(("x",) * slots,) * 4,
    )


def test_losses_and_errors_by_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Figure] = []
    save = save_figure

    def keep(figure: Figure, path: Path) -> None:
        kept.append(figure)
        save(figure, path)

    monkeypatch.setattr(plot, "save_figure", keep)
    left = [make_scores(length, slots, "left", 3.0) for length in (8, 3) for slots in (1, 2)]
    both = [make_scores(length, slots, "both", 2.0) for length in (3, 8) for slots in (1, 2)]
    plot_gaps(tmp_path / "gaps.png", "gaps", {"control": left[:2], "ul2r": [*left, *both]})

    assert (tmp_path / "gaps.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = kept
    assert len(figure.axes) == 4  # two metrics, one and two gaps in a text
    lines = [c for c in figure.axes[0].containers if isinstance(c, ErrorbarContainer)]
    assert len(lines) == 3
    for line, (mean, lengths) in zip(lines, [(3, 1), (3, 2), (2, 2)], strict=True):
        points, _, (bars,) = line.lines
        assert points.get_ydata() == pytest.approx([mean] * lengths)
        # Of four texts: 0.5 x sqrt(4 / 3) / sqrt(4).
        for (_, low), (_, high) in bars.get_segments():
            assert (high - low) / 2 == pytest.approx(0.5 / np.sqrt(3))
