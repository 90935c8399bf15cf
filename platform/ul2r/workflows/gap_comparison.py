"""Gaps of a comparison's arms: side by side, and paired with each other gap by gap."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ul2r.errors import RecipeError
from ul2r.evaluation.gaps import GapScores
from ul2r.evaluation.gaps.plot import plot_gaps
from ul2r.evaluation.gaps.result import RESULT_FILE, load_gaps_of
from ul2r.evaluation.gaps.selection import ORIGINS
from ul2r.evaluation.paired import PairedDifference
from ul2r.filesystem import write_atomically
from ul2r.workflows.few_shot_comparison import FewShotArm

logger = logging.getLogger(__name__)

GAPS_FILE = "gaps.json"
GAPS_TABLE_FILE = "gaps.md"
GAPS_PLOT_FILE = "gaps.png"
MAIN_METRICS = {
    "loss": "loss",
    "loss_at/1": "loss of the 1st token",
    "first_token_accuracy": "1st token right",
    "exact_match": "exact match",
    "edit_similarity": "edit similarity",
}
MAX_COLUMNS = 16
"""Longest gaps whose losses the table shows token by token."""
NOTES = (
    "Reading: left is the text before a gap, causally and without a mode; both is UL2R's, with sentinels in place of "
    "the gaps; fim is prefix, suffix, middle, with one gap at a time. Losses are nats per token, given the true tokens "
    "before; the same gaps for all.",
    "± is one standard error over texts. A difference is paired, gap by gap, so that its error is smaller than those "
    "of the two means; in brackets the 95 % bootstrap interval.",
    "Losses by origin are those of tokens that occur, in the text that is shown, right of the gap alone, left of it "
    "alone, on both sides, or on neither.",
    "Of left the length is given; both and fim end their gaps themselves.",
)


@dataclass(frozen=True)
class _Measured:
    """Scores of an arm in one reading."""

    role: str
    scores: GapScores

    @property
    def name(self) -> str:
        return f"{self.role}, {self.scores.reading}"


def write_gap_comparison(
    folder: Path, title: str, arms: Mapping[str, FewShotArm], token_store: str
) -> tuple[Path, ...]:
    """Write gaps.md, gaps.json and gaps.png of the arms whose gaps were measured; return them if there are two arms.

    Results of other weights, as before more training, or of another text are left out with a warning.

    Args:
        folder: Folder of the comparison.
        title: Its name.
        arms: The arms, base first.
        token_store: Fingerprint of their token store.

    Raises:
        RecipeError: If two arms were measured on other gaps.
    """
    measured = [
        _Measured(role, scores)
        for role, arm in arms.items()
        for scores in _load(role, arm, token_store)
    ]
    files = [folder / name for name in (GAPS_TABLE_FILE, GAPS_FILE, GAPS_PLOT_FILE)]
    by_role: dict[str, list[GapScores]] = {}
    for entry in measured:
        by_role.setdefault(entry.role, []).append(entry.scores)
    if len(by_role) < 2:
        # Those of results that are there no more would be taken for these arms'.
        for file in files:
            file.unlink(missing_ok=True)
        return ()

    groups: dict[str, list[_Measured]] = {}
    for entry in measured:
        groups.setdefault(entry.scores.name, []).append(entry)
    differences = {name: dict(_iter_pairs(entries)) for name, entries in groups.items()}
    table, tree, plot = files
    write_atomically(tree, json.dumps(_as_plain(groups, differences), indent=2) + "\n")
    write_atomically(table, "\n".join(_iter_lines(title, groups, differences)) + "\n")
    plot_gaps(plot, f"{title}: held-out gaps", by_role)
    return tuple(files)


def _load(role: str, arm: FewShotArm, token_store: str) -> list[GapScores]:
    if not (arm.paths.gaps / RESULT_FILE).is_file():
        return []
    scores = load_gaps_of(arm.paths.gaps, arm.find_digest(), token_store)
    if scores is None:
        logger.warning(
            "%s: left out, since %s has other weights or another token store by now: run `ul2r evaluate --suite gaps` "
            "again",
            arm.paths.gaps,
            role,
        )
    return scores or []


def _iter_pairs(
    entries: Sequence[_Measured],
) -> Iterator[tuple[tuple[str, str], dict[str, PairedDifference]]]:
    """Yield the names of the first and the second of a pair, and their differences, second minus first.

    What sees both sides is compared with the arm's own left side, with the other arms' left side, and with all before
    it that see both.
    """
    for number, second in enumerate(entries):
        if second.scores.reading == "left":
            continue
        for place, first in enumerate(entries):
            is_left = first.scores.reading == "left"
            # Another arm of both sides, such as FIM, is the opponent of those behind it.
            if is_left or (place < number and first.role != second.role):
                yield (first.name, second.name), _compare(first, second)


def _compare(first: _Measured, second: _Measured) -> dict[str, PairedDifference]:
    try:
        return first.scores.compare(second.scores)
    except RecipeError as error:
        raise RecipeError(f"{first.role} and {second.role}: {error}") from None


def _as_plain(
    groups: Mapping[str, Sequence[_Measured]],
    differences: Mapping[str, Mapping[tuple[str, str], Mapping[str, PairedDifference]]],
) -> list[dict[str, Any]]:
    return [
        {
            "gaps": name,
            "scores": {
                entry.name: {m: asdict(score) for m, score in entry.scores.summarize().items()}
                for entry in entries
            },
            "differences": [
                {
                    "first": first,
                    "second": second,
                    "metrics": {metric: asdict(pair) for metric, pair in found.items()},
                }
                for (first, second), found in differences[name].items()
            ],
        }
        for name, entries in groups.items()
    ]


def _iter_lines(
    title: str,
    groups: Mapping[str, Sequence[_Measured]],
    differences: Mapping[str, Mapping[tuple[str, str], Mapping[str, PairedDifference]]],
) -> Iterator[str]:
    """Yield the lines of a Markdown page."""
    yield from (
        f"# {title}: held-out gaps",
        "",
        "Gaps are named by their tokens and their number in a text.",
        "",
    )
    rows = [(name, entry) for name, entries in groups.items() for entry in entries]
    yield from _iter_table(
        ("gaps", "arm, reading", *MAIN_METRICS.values(), "texts"),
        (
            (name, entry.name, *_format(entry, list(MAIN_METRICS)), str(len(entry.scores.hashes)))
            for name, entry in rows
        ),
    )
    yield from ("## Differences", "", "Of each line the second minus the first.", "")
    yield from _iter_table(
        ("gaps", "first", "second", *MAIN_METRICS.values()),
        (
            (name, *pair, *(_format_difference(found.get(metric)) for metric in MAIN_METRICS))
            for name, pairs in differences.items()
            for pair, found in pairs.items()
        ),
    )
    yield from ("## Loss by origin", "")
    yield from _iter_table(
        ("gaps", "arm, reading", *ORIGINS),
        (
            (name, entry.name, *_format(entry, [f"loss_of/{origin}" for origin in ORIGINS]))
            for name, entry in rows
        ),
    )
    for name, entries in groups.items():
        length = entries[0].scores.length
        if length <= MAX_COLUMNS:
            yield from (f"## Loss by place: {name}", "")
            places = [f"{place}" for place in range(1, length + 1)]
            yield from _iter_table(
                ("arm, reading", *places),
                (
                    (entry.name, *_format(entry, [f"loss_at/{p}" for p in places]))
                    for entry in entries
                ),
            )
    yield from (f"- {note}" for note in NOTES)


def _format(entry: _Measured, metrics: Sequence[str]) -> list[str]:
    found = entry.scores.summarize()
    return [found[metric].format(3) if metric in found else "" for metric in metrics]


def _format_difference(pair: PairedDifference | None) -> str:
    if pair is None:
        return ""
    return f"{pair.difference.mean:+.3f} ± {pair.difference.stderr:.3f} [{pair.low:+.3f}, {pair.high:+.3f}]"


def _iter_table(headings: Sequence[str], rows: Iterator[tuple[str, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(headings)} |"
    yield "|---" * len(headings) + "|"
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""
