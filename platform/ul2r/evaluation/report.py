"""A report of results as one HTML file that holds all it shows, to be sent to a colleague."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2

import ul2r
from ul2r.evaluation.scores import InfilledText

TEMPLATE = "report.html"
MAX_EXAMPLES = 12


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: What it shows.
        is_best: True for a score that is best, or within the error of it.
    """

    text: str
    is_best: bool = False


@dataclass(frozen=True)
class ReportTable:
    """A table, its columns aligned right but the first.

    Attributes:
        title: Its heading.
        columns: Headings.
        rows: Cells, as many as columns.
        notes: Sentences below it.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Picture:
    """A figure.

    Attributes:
        caption: What it shows.
        path: PNG file.
    """

    caption: str
    path: Path

    @property
    def source(self) -> str:
        """The picture as a data URI, so that the page is a single file."""
        encoded = base64.b64encode(self.path.read_bytes()).decode("ascii")
        return f"data:image/png;base64,{encoded}"


@dataclass(frozen=True)
class Example:
    """A held-out span and what each arm wrote in its place.

    Attributes:
        left: Text before it.
        target: The span.
        right: Text after it.
        answers: Arm, answer and edit similarity.
    """

    left: str
    target: str
    right: str
    answers: Sequence[tuple[str, str, float]]


@dataclass(frozen=True)
class Report:
    """Contents of a report, from its top down.

    Attributes:
        title: Its heading.
        summary: A line below it.
        verdict: Paragraphs on what the numbers say.
        pictures: Figures.
        tables: Tables.
        examples: Infilled spans, side by side.
        settings: Name and text of each recipe.
    """

    title: str
    summary: str
    verdict: Sequence[str]
    pictures: Sequence[Picture]
    tables: Sequence[ReportTable]
    examples: Sequence[Example] = ()
    settings: Sequence[tuple[str, str]] = field(default_factory=tuple)


def render_report(report: Report) -> str:
    """Return the report as a page that opens without a network, for light and dark screens."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        # Texts are the corpus's and the models'.
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE).render(report=report, version=ul2r.__version__)


def pair_examples(infilled: Sequence[tuple[str, Sequence[InfilledText]]]) -> list[Example]:
    """Return the spans of which all arms' answers are kept, side by side.

    Args:
        infilled: Name and spans of each arm; all were measured on the same ones.
    """
    if not all(texts for _, texts in infilled):
        return []
    columns = zip(*(texts for _, texts in infilled), strict=False)
    return [
        Example(
            texts[0].left,
            texts[0].target,
            texts[0].right,
            [
                (name, text.answer, text.edit_similarity)
                for (name, _), text in zip(infilled, texts, strict=True)
            ],
        )
        for texts in list(columns)[:MAX_EXAMPLES]
    ]
