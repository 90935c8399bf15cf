"""Sections of an experiment's description, and tables as MLflow stores them."""

from ul2r.tracking.notes import MAX_NOTE_LENGTH, replace_section
from ul2r.tracking.tables import split_table

OTHERS = "Written on the page.\n\n## Comparison other\n\n| a |\n|---|\n\n## Mine\n\nkept"


def test_section_replaces_the_one_under_its_heading_and_nothing_else() -> None:
    once = replace_section(OTHERS, "Comparison a.b", "first\n\n- note")
    assert once is not None
    assert once.startswith("## Comparison a.b\n\nfirst\n\n- note\n\n")
    assert once.endswith(OTHERS)
    twice = replace_section(once, "Comparison a.b", "second")
    assert twice == f"## Comparison a.b\n\nsecond\n\n{OTHERS}"
    # A heading that begins alike is another one.
    longer = replace_section(twice, "Comparison a", "third")
    assert longer is not None
    assert "second" in longer
    assert replace_section("", "Comparison a", "text") == "## Comparison a\n\ntext"


def test_section_is_cut_at_a_line_and_other_text_is_not() -> None:
    lines = "\n".join(f"| row {number} |" for number in range(1000))
    note = replace_section(OTHERS, "Comparison", lines)
    assert note is not None
    assert len(note) <= MAX_NOTE_LENGTH
    assert note.endswith(OTHERS)
    assert "| row 200 |\n" in note
    assert replace_section("x" * (MAX_NOTE_LENGTH - 40), "Comparison", lines) is None


def test_table_is_split_into_columns_and_rows() -> None:
    table = split_table({"a": [1, 2], "b": ["x", "y"]})
    assert table == {"columns": ["a", "b"], "data": [[1, "x"], [2, "y"]]}
