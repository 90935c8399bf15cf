from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from ul2r.config import MIXTURE_PRESETS, Causal, Prefix, Recipe, dump
from ul2r.data.inspection import (
    MAX_SHOWN_TOKENS,
    PICTURE_SIZE,
    draw_attention,
    measure_mixture,
    render_tokens,
    write_page,
)
from ul2r.data.store.dataset import TokenDataset
from ul2r.data.tokenizer import load_tokenizer
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.recipes import tiny_recipe

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    return make_tiny_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    mixture = [*MIXTURE_PRESETS["ul2r"], *MIXTURE_PRESETS["fim"]]
    return tiny_recipe(
        tmp_path_factory.mktemp("storage"),
        objective={
            "mixture": [one.model_dump() for one in mixture],
            "sequence_length": 128,
            "slots_per_row": 2,
        },
        training={"steps": 100},
    )


class Page(HTMLParser):
    """Counts a page's elements by class and keeps its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.classes: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, _: str, attributes: list[tuple[str, str | None]]) -> None:
        self.classes += (dict(attributes).get("class") or "").split()

    def handle_data(self, data: str) -> None:
        self.text += data


def test_numbers_found_are_those_that_were_set(recipe: Recipe, dataset: TokenDataset) -> None:
    found = measure_mixture(recipe, dataset)
    assert sum(one.num_examples for one in found) == 512 * 2
    assert sum(one.fraction for one in found) == pytest.approx(1)
    for one in found:
        # Four standard deviations of a share of 1,024 examples.
        assert (
            abs(one.fraction - one.target_fraction)
            < 4 * (one.target_fraction * (1 - one.target_fraction) / 1024) ** 0.5
        )
        assert one.filled >= 1 - 2 / 64
        if one.denoiser.kind == "span_corruption":
            assert one.mean_spans == one.denoiser.num_sentinels(one.raw_length)
            masked = one.denoiser.num_noise_tokens(one.raw_length) / one.raw_length
            assert one.masked == pytest.approx(masked)


def test_modes_that_are_text_are_counted_as_modes(recipe: Recipe, dataset: TokenDataset) -> None:
    modes = dict.fromkeys(dataset.vocabulary.modes, (300, 301, 302))
    vocabulary = replace(dataset.vocabulary, modes=modes, modes_are_text=True)
    for one in measure_mixture(recipe, replace(dataset, vocabulary=vocabulary)):
        if one.denoiser.kind == "span_corruption":
            assert one.raw_length == recipe.objective.raw_length(one.denoiser, 3)
            masked = one.denoiser.num_noise_tokens(one.raw_length) / one.raw_length
            assert one.masked == pytest.approx(masked)


def test_shares_of_targets_are_counted_from_the_examples_themselves(
    recipe: Recipe, dataset: TokenDataset
) -> None:
    by_name = {one.denoiser.name: one for one in measure_mixture(recipe, dataset)}
    dense = by_name["X-dense"]
    assert dense.denoiser.kind == "span_corruption"
    spans = dense.denoiser.num_sentinels(dense.raw_length)
    targets = dense.denoiser.num_noise_tokens(dense.raw_length) + spans + 1
    positions = dense.denoiser.example_length(dense.raw_length) - 1
    assert dense.with_loss == pytest.approx(targets / positions)
    assert by_name["causal"].with_loss == by_name["FIM"].with_loss == 1


def test_examples_shown_are_text_of_the_store(recipe: Recipe, dataset: TokenDataset) -> None:
    store = dataset.train[0].store.read_tokens(0, len(dataset.train[0].store) + 200).tobytes()
    special = dataset.vocabulary.non_text_ids
    for one in measure_mixture(recipe, dataset):
        assert len(one.examples) == 2
        for example in one.examples:
            assert (example.inputs == []) == (one.denoiser.kind in {"causal", "fim"})
            if one.denoiser.kind == "prefix":
                text = [*example.inputs[1:], *example.targets[:-1]]
                assert not special & set(text)
                assert np.array(text, np.int32).tobytes() in store


def test_outline_holds_what_is_seen_and_nothing_else(recipe: Recipe, dataset: TokenDataset) -> None:
    """Its area is the share of (query, key) pairs that see each other; a sloped edge cuts half of a pair off."""
    for one in measure_mixture(recipe, dataset):
        for example in one.examples:
            points = [
                tuple(map(float, point.split(","))) for point in draw_attention(example).split()
            ]
            x, y = np.array(points).T
            area = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2 / PICTURE_SIZE**2
            seen = (example.kv_end - example.kv_start).sum() / example.num_positions**2
            assert area == pytest.approx(seen, abs=1.5 / example.num_positions)


def test_long_runs_of_tokens_are_shown_by_their_ends(dataset: TokenDataset) -> None:
    tokenizer = load_tokenizer(dataset.tokenizer_file)
    tokens = dataset.train[0].store.read_tokens(0, MAX_SHOWN_TOKENS + 40).tolist()
    pieces = render_tokens(tokens, tokenizer, dataset.vocabulary)
    assert len(pieces) == MAX_SHOWN_TOKENS + 1
    (left_out,) = [piece for piece in pieces if piece.kind == "omitted"]
    assert left_out.text.strip() == "… 40 tokens …"
    assert [piece.token_id for piece in pieces if piece != left_out] == tokens[:150] + tokens[-150:]


def test_page_shows_every_token_of_its_examples_coloured(
    recipe: Recipe, dataset: TokenDataset
) -> None:
    page = Page(write_page(recipe, dataset))
    examples = [example for one in measure_mixture(recipe, dataset) for example in one.examples]
    tokens = [token for example in examples for token in (*example.inputs, *example.targets)]
    vocabulary = dataset.vocabulary
    in_legend = 1
    sentinels = set(vocabulary.sentinels)
    modes = vocabulary.non_text_ids - sentinels
    assert page.classes.count("mode") == sum(t in modes for t in tokens) + in_legend
    assert page.classes.count("sentinel") == sum(t in sentinels for t in tokens) + in_legend
    assert page.classes.count("eos") == tokens.count(vocabulary.eos) + in_legend
    assert page.classes.count("example") == len(examples)
    assert "<extra_id_0>" in page.text, "escaped, so that it is text and no element"
    assert dataset.manifest.fingerprint[:12] in page.text


def test_same_run_gives_the_same_page(recipe: Recipe, dataset: TokenDataset) -> None:
    first = write_page(recipe, dataset).read_bytes()
    assert write_page(recipe, dataset).read_bytes() == first


def test_run_shorter_than_what_is_measured_shows_what_it_has(
    dataset: TokenDataset, tmp_path: Path
) -> None:
    mixture = [Prefix(weight=1).model_dump(), Causal(weight=1e-9).model_dump()]
    short = tiny_recipe(tmp_path, training={"steps": 1}, objective={"mixture": mixture})
    assert sum(one.num_examples for one in measure_mixture(short, dataset)) == 8
    assert "None among the first rows." in write_page(short, dataset).read_text()


def test_job_without_a_token_store_ends_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(dump(tiny_recipe(tmp_path)))
    command = [sys.executable, str(ROOT / "jobs/inspect_data.py"), str(file)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert (
        ran.stderr
        == f"error: {tmp_path}/store: no token store here: run jobs/prepare.py RECIPE first\n"
    )
