"""The HTML report: one file, complete, with nothing of the texts taken for markup."""

from __future__ import annotations

import base64
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ul2r.evaluation.report import Cell, Picture, Report, ReportTable, pair_examples, render_report
from ul2r.evaluation.scores import InfilledText

PIXEL = b"\x89PNG\r\n\x1a\n-pixels-"


class Page(HTMLParser):
    """Texts of a page by tag, and what it loads."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.tags: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [value or "" for name, value in attrs if name in {"src", "href"}]

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.tags[-1], data))


@pytest.fixture
def page(tmp_path: Path) -> Page:
    picture = tmp_path / "plot.png"
    picture.write_bytes(PIXEL)
    spans = [InfilledText("if a ", "<script>", " b & c", "<b>x</b>", 0.25)]
    report = Report(
        title="demo",
        summary="three arms",
        verdict=["better: <everything>"],
        pictures=[Picture("losses", picture)],
        tables=[
            ReportTable(
                "Scores",
                ["held out", "base"],
                [[Cell("loss"), Cell("1.0 ± 0.1", is_best=True)]],
                ["± is one standard error."],
            )
        ],
        examples=pair_examples([("base", spans), ("ul2r", spans)]),
        settings=[("base", "name: demo-base")],
    )
    return Page(render_report(report))


def test_loads_nothing_but_itself(page: Page) -> None:
    assert page.loaded == [f"data:image/png;base64,{base64.b64encode(PIXEL).decode()}"]
    assert "script" not in page.tags
    assert "link" not in page.tags


def test_texts_stay_texts(page: Page) -> None:
    """Text of the corpus and of the models is shown as it is."""
    assert "b" not in page.tags
    assert ("mark", "<script>") in page.texts
    assert [text for _, text in page.texts].count("<b>x</b>") == 2  # of both arms
    assert ("p", "better: <everything>") in page.texts


def test_best_is_marked(page: Page) -> None:
    assert ("td", "1.0 ± 0.1") in page.texts
    assert ("pre", "name: demo-base") in page.texts


def test_no_examples_if_an_arm_kept_none() -> None:
    span = InfilledText("a", "b", "c", "d", 0.0)
    assert pair_examples([("base", [span]), ("ul2r", [])]) == []
