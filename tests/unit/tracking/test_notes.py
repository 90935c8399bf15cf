"""Sections of a description, and tables as MLflow stores them."""

from ul2r.tracking.sections import MAX_NOTE_LENGTH, replace_section
from ul2r.tracking.tables import split_table

PREFACE = "Written on the page."
SECTIONS = "## Comparison other\n\n| a |\n|---|\n\n## Mine\n\nkept"
OTHERS = f"{PREFACE}\n\n{SECTIONS}"


def test_section_replaces_the_one_under_its_heading_and_nothing_else() -> None:
    once = replace_section(OTHERS, "Comparison a.b", "first\n\n- note\n")
    end = "<!-- end of Comparison a.b -->"
    assert once == f"{PREFACE}\n\n## Comparison a.b\n\nfirst\n\n- note\n\n{end}\n\n{SECTIONS}"
    twice = replace_section(once, "Comparison a.b", "second")
    assert twice == f"{PREFACE}\n\n## Comparison a.b\n\nsecond\n\n{end}\n\n{SECTIONS}"
    # A heading that begins alike is another one.
    longer = replace_section(twice, "Comparison a", "third")
    assert longer is not None
    assert "second" in longer
    section = "## A\n\ntext\n\n<!-- end of A -->"
    assert replace_section("", "A", "text") == section
    assert replace_section(PREFACE, "A", "text") == f"{PREFACE}\n\n{section}"


def test_section_that_is_there_already_stays_in_its_place() -> None:
    note = f"## A\n\nfirst\n\n<!-- end of A -->\n\n{OTHERS}"
    both = replace_section(note, "B", "second")
    assert both is not None
    assert both.index("## B") < both.index("## A")
    assert replace_section(both, "A", "first\n") == both


def test_text_written_behind_a_section_stays() -> None:
    note = replace_section("", "A", "first")
    assert note is not None
    again = replace_section(f"{note}\n\nMine, without a heading.", "A", "second")
    assert again is not None
    assert "Mine, without a heading." in again
    assert "first" not in again


def test_section_of_an_earlier_version_is_replaced_up_to_the_next_heading() -> None:
    assert replace_section("## A\n\nold\n\n## B\n\nb", "A", "new") == (
        "## A\n\nnew\n\n<!-- end of A -->\n\n## B\n\nb"
    )


def test_section_is_cut_at_a_line_and_other_text_is_not() -> None:
    lines = "\n".join(f"| row {number} |" for number in range(1000))
    note = replace_section(OTHERS, "Comparison", lines)
    assert note is not None
    assert len(note) <= MAX_NOTE_LENGTH
    assert note.startswith(PREFACE)
    assert note.endswith(SECTIONS)
    assert "| row 200 |\n" in note
    assert replace_section("x" * (MAX_NOTE_LENGTH - 55), "Comparison", lines) is None


def test_table_is_split_into_columns_and_rows() -> None:
    table = split_table({"a": [1, 2], "b": ["x", "y"]})
    assert table == {"columns": ["a", "b"], "data": [[1, "x"], [2, "y"]]}
