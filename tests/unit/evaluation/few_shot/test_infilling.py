"""Texts with a gap: what each kind of model reads, what counts of what it writes, and its scores."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest

from ul2r.config.few_shot import FewShot
from ul2r.errors import CorpusError, RequestError
from ul2r.evaluation.few_shot import infill_running
from ul2r.evaluation.few_shot.infill_problems import (
    Problem,
    cut_text,
    is_complete,
    read_problem,
    score_code,
    score_sentence,
)
from ul2r.evaluation.few_shot.infill_prompts import InfillForm, InfillPrompt
from ul2r.evaluation.few_shot.infill_running import LoadedInfillTask, run_infill_task
from ul2r.evaluation.few_shot.suites import InfillTask, load_suite
from ul2r.evaluation.row_scoring import ScoringRow, score_rows
from ul2r.inference import LanguageModel, infill
from ul2r.inference.document_start import DocumentStart
from ul2r.testing.models import write_tiny_export

CODE = {task.name: task for task in load_suite("humaneval-infilling").infilling}
(STORY,) = load_suite("rocstories").infilling
LEFT = "def area(width, height):\n"
RIGHT = "    return result\n"
PROBLEM = Problem(
    "area", LEFT, RIGHT, "    result = width * height\n", "assert area(2, 3) == 6\narea"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    folder = tmp_path_factory.mktemp("infill")
    return LanguageModel.load(write_tiny_export(folder / "export", eos_after_inputs=True))


def view(model: LanguageModel, **metadata: Any) -> LanguageModel:  # noqa: ANN401  fields of metadata
    """Return the model as one that was trained otherwise."""
    return LanguageModel(
        model.network,
        model.tokenizer,
        replace(model.metadata, **metadata),
        model.eos_token_ids,
    )


def prompt_of(model: LanguageModel, left: str, right: str, **settings: Any) -> InfillPrompt:  # noqa: ANN401  settings
    assert model.vocabulary is not None
    start = DocumentStart((), model.vocabulary.eos)
    form = InfillForm(model, start, FewShot.model_validate(settings))
    return form.build_prompt(left, right, "NLU", num_written=8)


def test_each_model_reads_what_it_was_trained_to_read(model: LanguageModel) -> None:
    vocabulary = model.vocabulary
    assert vocabulary is not None
    first, second, third = vocabulary.sentinels[:3]
    left = model.encode(LEFT)
    right = model.encode_continuation(RIGHT)

    both = prompt_of(model, LEFT, RIGHT)
    mode = vocabulary.modes["NLU"]
    assert both.inputs == (*mode, *left, first, *right, second, vocabulary.eos)
    assert (both.opener, both.closers) == ((first,), (second,))
    assert prompt_of(model, LEFT, RIGHT, mode="NLG").inputs[: len(vocabulary.modes["NLG"])] == (
        *vocabulary.modes["NLG"],
    )
    # A gap at the end is closed by eos.
    end = prompt_of(model, LEFT, "")
    assert end.inputs == (*mode, *left, first, vocabulary.eos)
    assert end.closers == (vocabulary.eos,)

    # Prefix, suffix, middle (arXiv 2207.14255, 3).
    fim = prompt_of(view(model, denoising=False, fim=True), LEFT, RIGHT)
    assert fim.inputs == (first, *left, second, *right)
    assert (fim.opener, fim.closers) == ((third,), (vocabulary.eos,))

    alone = prompt_of(view(model, denoising=False), LEFT, RIGHT)
    assert alone.inputs == tuple(model.encode(LEFT.rstrip()))
    assert alone.opener == ()
    # No text at all is read as an empty document.
    assert prompt_of(view(model, denoising=False), "", RIGHT).inputs == (vocabulary.eos,)


def test_a_model_that_sees_the_left_side_alone_writes_white_space_before_the_gap(
    model: LanguageModel,
) -> None:
    """A tokenizer has newline and indentation as one token: no text ends in a newline and goes on with spaces."""
    left = "if wet:\n    "
    prompt = prompt_of(model, left, RIGHT, reading="left")
    assert prompt.before == prompt.inputs == tuple(model.encode("if wet:"))
    assert prompt.held_back == "\n    "
    assert prompt.remove_held_back("\n    return") == "return"
    assert prompt.remove_held_back("\n  return") == "return"
    assert prompt.remove_held_back(" # rain\n    return") == " # rain\n    return"
    assert prompt.remove_held_back("\n") == ""
    # As it is served.
    assert prompt_of(model, left, RIGHT).before == tuple(model.encode(left))


def test_reading_that_a_model_was_not_trained_for_is_refused(model: LanguageModel) -> None:
    with pytest.raises(RequestError, match=r"reading=fim: .* choose both or left"):
        prompt_of(model, LEFT, RIGHT, reading="fim")
    assert prompt_of(model, LEFT, RIGHT, reading="left").opener == ()


def test_long_texts_are_cut_far_from_the_gap_and_counted(model: LanguageModel) -> None:
    assert model.vocabulary is not None
    form = InfillForm(model, DocumentStart((), model.vocabulary.eos), FewShot())
    room = model.max_position_embeddings
    left, right = "he was calm " * room, "and the sea " * room
    prompt = form.build_prompt(left, right, "NLU", num_written=8)
    assert len(prompt.inputs) + len(prompt.opener) + 8 == room
    assert tuple(model.encode(left)[-len(prompt.before) :]) == prompt.before
    assert form.truncation.num_requests == 1
    # A short side leaves its room to the other one.
    short = form.build_prompt("he", right, "NLU", num_written=8)
    assert short.before == tuple(model.encode("he"))
    assert len(short.inputs) == len(prompt.inputs)
    with pytest.raises(RequestError, match="leaves no room"):
        form.build_prompt(left, right, "NLU", num_written=room)


@pytest.mark.parametrize(
    ("task", "sees_right", "text", "expected"),
    [
        ("single_line", True, "    x = 1\n    y = 2\n", "    x = 1\n"),
        ("single_line", False, "\n\n    x = 1", "    x = 1\n"),
        ("multi_line", True, "a\nb\nc\n", "a\nb\nc\n"),
        ("multi_line", False, "a\nb\nc\n", "a\n"),  # the problem's own text has one line
        ("random_span", True, "x" * 99, "x" * 99),
        ("random_span", False, "x" * 99, "x" * len(PROBLEM.target)),
        ("middle_sentence", False, " It cost 3.50 Dr. Who said. And", " It cost 3.50 Dr."),
        ("middle_sentence", True, " One. Two.", " One. Two."),
    ],
)
def test_text_is_cut_by_what_is_known_of_the_gap(
    task: str, text: str, expected: str, *, sees_right: bool
) -> None:
    entry = {**CODE, STORY.name: STORY}[task]
    assert cut_text(entry, PROBLEM, text, sees_right=sees_right) == expected
    # What ends early is what would have been cut.
    for length in range(len(text) + 1):
        if is_complete(entry, PROBLEM, text[:length], sees_right=sees_right):
            assert cut_text(entry, PROBLEM, text[:length], sees_right=sees_right) == expected


def test_program_is_scored_by_its_tests() -> None:
    right = PROBLEM.target
    results = score_code([(PROBLEM, right), (PROBLEM, "    result = 0\n"), (PROBLEM, right)])
    assert [result.is_passed for result in results] == [True, False, True]
    assert results[1].detail == "AssertionError"


def test_sentences_are_scored_by_their_longest_common_subsequence() -> None:
    # "the cat sat" of 4 and 5 words: recall 3/4, precision 3/5.
    assert score_sentence(" The cat sat down.", "the cat, it sat!") == pytest.approx(6 / 8)
    assert score_sentence("a", "b") == 0
    assert score_sentence("a", "...") == 0


def rows_of(task: InfillTask) -> list[dict[str, str]]:
    if task.kind == "code":
        column = {"prompt": LEFT, "suffix": RIGHT, "canonical_solution": PROBLEM.target}
        tests = {"test": "def check(f):\n    assert f(2, 3) == 6", "entry_point": "area"}
        return [{**column, **tests, "task_id": str(number)} for number in range(3)]
    sentences = {f"sentence{n}": f"The sea was calm and {n} he was." for n in range(1, 6)}
    return [{"story_id": str(number), **sentences} for number in range(2)]


@pytest.mark.parametrize("reading", ["both", "left"])
def test_task_is_run_and_scored_item_by_item(model: LanguageModel, reading: str) -> None:
    assert model.vocabulary is not None
    start = DocumentStart((), model.vocabulary.eos)
    settings = FewShot.model_validate(
        {"reading": reading, "samples": 2, "temperature": 1.0, "limit": 2}
    )
    entry = CODE["single_line"].model_copy(update={"max_tokens": 6})
    task = LoadedInfillTask(entry, rows_of(entry), "data")
    rows, means = run_infill_task(model, InfillForm(model, start, settings), task, settings)
    assert [(row["item"], row["metric"], row["is_headline"]) for row in rows] == [
        (0, "pass@1", True),
        (0, "exact_match", False),
        (1, "pass@1", True),
        (1, "exact_match", False),
    ]
    assert means["pass@1"] == 0
    again, _ = run_infill_task(model, InfillForm(model, start, settings), task, settings)
    assert again == rows


def test_progress_is_shown_text_by_text(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hundreds are in memory at a time, and take a CPU many minutes."""
    shown: list[float] = []

    class Bar:
        def update(self, completed: float) -> None:
            shown.append(completed)

    monkeypatch.setattr(infill_running, "show_progress", lambda *_: nullcontext(Bar()))
    assert model.vocabulary is not None
    entry = CODE["single_line"].model_copy(update={"max_tokens": 6})
    task = LoadedInfillTask(entry, rows_of(entry), "data")
    settings = FewShot.model_validate({"samples": 2, "temperature": 1.0})
    form = InfillForm(model, DocumentStart((), model.vocabulary.eos), settings)
    run_infill_task(model, form, task, settings)
    assert shown == [0, 0, 1, 1, 2, 2, 3]


def test_greedy_text_is_that_of_infilling_as_it_is_served(model: LanguageModel) -> None:
    assert model.vocabulary is not None
    start = DocumentStart((), model.vocabulary.eos)
    entry = CODE["multi_line"].model_copy(update={"max_tokens": 6})
    task = LoadedInfillTask(entry, rows_of(entry), "data")
    rows, _ = run_infill_task(model, InfillForm(model, start, FewShot()), task, FewShot())
    served = infill(model, [LEFT, RIGHT], mode="NLG", max_tokens=6)
    assert json.loads(rows[0]["answer"]) == list(served.fills)


def test_loss_of_a_story_is_that_of_its_sentence(model: LanguageModel) -> None:
    vocabulary = model.vocabulary
    assert vocabulary is not None
    task = LoadedInfillTask(STORY.model_copy(update={"max_tokens": 4}), rows_of(STORY), "data")
    form = InfillForm(model, DocumentStart((), vocabulary.eos), FewShot())
    rows, means = run_infill_task(model, form, task, FewShot())
    assert set(means) == {"rouge_l", "loss", "bits_per_byte"}

    problem = read_problem(STORY, rows_of(STORY)[0])
    assert problem.left.endswith("2 he was.")
    assert problem.target == " The sea was calm and 3 he was."
    sentinels = vocabulary.sentinels
    target = tuple(model.encode_continuation(problem.target))
    inputs = (
        *vocabulary.modes["NLU"],
        *model.encode(problem.left),
        sentinels[0],
        *model.encode_continuation(problem.right),
        sentinels[1],
        vocabulary.eos,
    )
    row = ScoringRow(inputs, sentinels[:1], target)
    (((_, score),),) = score_rows(model, [row], bidirectional=True)
    loss = next(row["value"] for row in rows if row["metric"] == "loss")
    assert loss == pytest.approx(-score.log_probability / len(target))


def test_data_without_a_column_is_refused() -> None:
    with pytest.raises(CorpusError, match="has no column 'task_id'"):
        read_problem(CODE["single_line"], {"prompt": ""})


def test_samples_that_would_be_the_same_are_refused() -> None:
    with pytest.raises(ValueError, match="samples=3 at temperature=0 are all the same"):
        FewShot(samples=3)
