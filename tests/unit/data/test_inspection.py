"""The page of training examples, and the statistics on it."""

from __future__ import annotations

import json
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
from ul2r.data.prepare.pairs import prepare_pairs
from ul2r.data.store.dataset import TokenDataset, open_run_dataset
from ul2r.data.tokenizer import (
    add_special_tokens,
    build_vocabulary,
    encode,
    load_tokenizer,
)
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.pairs import write_pairs
from ul2r.testing.recipes import tiny_recipe
from ul2r.testing.tokenizers import KINDS

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
            "mixture": [denoiser.model_dump() for denoiser in mixture],
            "sequence_length": 128,
            "slots_per_row": 2,
        },
        training={"steps": 100},
    )


def test_page_shows_each_pair_of_a_slot_and_the_share_of_slots(tmp_path: Path) -> None:
    make_tiny_store(tmp_path / "store", num_documents=12)
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    mixture = [{"kind": "pairs", "weight": 1}, {"kind": "prefix", "weight": 3}]
    recipe = tiny_recipe(
        tmp_path,
        data={"num_sentinels": 64, "pairs": [str(pairs)]},
        objective={"mixture": mixture, "sequence_length": 128},
        training={"steps": 10},
    )
    prepare_pairs(recipe)
    dataset = open_run_dataset(recipe)
    of_pairs, of_text = measure_mixture(recipe, dataset)
    assert (of_pairs.fraction, of_text.fraction) == (0.25, 0.75)
    # 10 batches of 8 rows, a quarter of them with several pairs.
    assert of_pairs.num_slots == 20
    assert of_pairs.num_examples > 40
    assert of_pairs.filled > 0.9
    assert of_text.num_examples == of_text.num_slots == 60

    tokenizer = load_tokenizer(dataset.tokenizer_file)
    records = [json.loads(line) for line in pairs.read_text().splitlines()]
    known = {(r["prompt"], r["answer"]) for r in records}
    for example in of_pairs.examples:
        mode, *prompt = example.inputs
        *answer, eos = example.targets
        assert mode == dataset.vocabulary.modes["S2S"][0]
        assert eos == dataset.vocabulary.eos
        assert (tokenizer.decode(prompt), tokenizer.decode(answer)) in known
    assert "pairs" in write_page(recipe, dataset).read_text()


class Page(HTMLParser):
    """Collects a page's text and the classes of its elements."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.classes: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, _: str, attributes: list[tuple[str, str | None]]) -> None:
        self.classes += (dict(attributes).get("class") or "").split()

    def handle_data(self, data: str) -> None:
        self.text += data


def test_measured_statistics_match_the_configuration(recipe: Recipe, dataset: TokenDataset) -> None:
    mixture = measure_mixture(recipe, dataset)
    assert sum(stats.num_examples for stats in mixture) == 512 * 2
    assert sum(stats.fraction for stats in mixture) == pytest.approx(1)
    for stats in mixture:
        # Four standard deviations of a fraction of 1,024 examples.
        target = stats.target_fraction
        assert abs(stats.fraction - target) < 4 * (target * (1 - target) / 1024) ** 0.5
        assert stats.filled >= 1 - 2 / 64
        if stats.denoiser.kind == "span_corruption":
            assert stats.mean_spans == stats.denoiser.num_sentinels(stats.raw_length)
            masked = stats.denoiser.num_noise_tokens(stats.raw_length) / stats.raw_length
            assert stats.masked == pytest.approx(masked)


def test_modes_written_as_text_do_not_count_as_raw_tokens(
    recipe: Recipe, dataset: TokenDataset
) -> None:
    modes = dict.fromkeys(dataset.vocabulary.modes, (300, 301, 302))
    vocabulary = replace(dataset.vocabulary, modes=modes, modes_are_text=True)
    for stats in measure_mixture(recipe, replace(dataset, vocabulary=vocabulary)):
        if stats.denoiser.kind == "span_corruption":
            assert stats.raw_length == recipe.objective.raw_length(stats.denoiser, 3)
            masked = stats.denoiser.num_noise_tokens(stats.raw_length) / stats.raw_length
            assert stats.masked == pytest.approx(masked)


def test_positions_with_loss_are_counted_from_the_examples(
    recipe: Recipe, dataset: TokenDataset
) -> None:
    by_name = {stats.denoiser.name: stats for stats in measure_mixture(recipe, dataset)}
    dense = by_name["X-dense"]
    assert dense.denoiser.kind == "span_corruption"
    spans = dense.denoiser.num_sentinels(dense.raw_length)
    targets = dense.denoiser.num_noise_tokens(dense.raw_length) + spans + 1
    positions = dense.denoiser.example_length(dense.raw_length) - 1
    assert dense.with_loss == pytest.approx(targets / positions)
    assert by_name["causal"].with_loss == by_name["FIM"].with_loss == 1


def test_examples_are_text_of_the_store(recipe: Recipe, dataset: TokenDataset) -> None:
    store = dataset.train[0].store.read_tokens(0, len(dataset.train[0].store) + 200).tobytes()
    special = dataset.vocabulary.non_text_ids
    for stats in measure_mixture(recipe, dataset):
        assert len(stats.examples) == 2
        for example in stats.examples:
            assert (example.inputs == []) == (stats.denoiser.kind in {"causal", "fim"})
            if stats.denoiser.kind == "prefix":
                text = [*example.inputs[1:], *example.targets[:-1]]
                assert not special & set(text)
                assert np.array(text, np.int32).tobytes() in store


def test_attention_polygon_covers_exactly_the_visible_keys(
    recipe: Recipe, dataset: TokenDataset
) -> None:
    # Its area is the fraction of visible (query, key) pairs; a sloped edge cuts a pair in half.
    for stats in measure_mixture(recipe, dataset):
        for example in stats.examples:
            points = [
                tuple(map(float, point.split(","))) for point in draw_attention(example).split()
            ]
            x, y = np.array(points).T
            area = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2 / PICTURE_SIZE**2
            visible = (example.kv_end - example.kv_start).sum() / example.num_positions**2
            assert area == pytest.approx(visible, abs=1.5 / example.num_positions)


def test_long_token_lists_show_both_ends(dataset: TokenDataset) -> None:
    tokenizer = load_tokenizer(dataset.tokenizer_file)
    tokens = dataset.train[0].store.read_tokens(0, MAX_SHOWN_TOKENS + 40).tolist()
    rendered = render_tokens(tokens, tokenizer, dataset.vocabulary)
    assert len(rendered) == MAX_SHOWN_TOKENS + 1
    (omitted,) = [token for token in rendered if token.kind == "omitted"]
    assert omitted.text.strip() == "… 40 tokens …"
    shown = [token.token_id for token in rendered if token != omitted]
    assert shown == tokens[:150] + tokens[-150:]


def test_page_marks_every_special_token(recipe: Recipe, dataset: TokenDataset) -> None:
    page = Page(write_page(recipe, dataset))
    examples = [example for stats in measure_mixture(recipe, dataset) for example in stats.examples]
    tokens = [token for example in examples for token in (*example.inputs, *example.targets)]
    vocabulary = dataset.vocabulary
    in_legend = 1
    sentinels = set(vocabulary.sentinels)
    modes = vocabulary.non_text_ids - sentinels
    assert page.classes.count("mode") == sum(t in modes for t in tokens) + in_legend
    assert page.classes.count("sentinel") == sum(t in sentinels for t in tokens) + in_legend
    assert page.classes.count("eos") == tokens.count(vocabulary.eos) + in_legend
    assert page.classes.count("example") == len(examples)
    assert "<extra_id_0>" in page.text, "escaped: text, not an element"
    assert dataset.manifest.fingerprint[:12] in page.text


def test_page_is_reproducible(recipe: Recipe, dataset: TokenDataset) -> None:
    first = write_page(recipe, dataset).read_bytes()
    assert write_page(recipe, dataset).read_bytes() == first


def test_short_run_is_measured_as_far_as_it_goes(dataset: TokenDataset, tmp_path: Path) -> None:
    mixture = [Prefix(weight=1).model_dump(), Causal(weight=1e-9).model_dump()]
    short = tiny_recipe(tmp_path, training={"steps": 1}, objective={"mixture": mixture})
    assert sum(stats.num_examples for stats in measure_mixture(short, dataset)) == 8
    assert "No examples in the first rows." in write_page(short, dataset).read_text()


def test_job_without_a_token_store_ends_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(dump(tiny_recipe(tmp_path)))
    command = [sys.executable, str(ROOT / "jobs/inspect_data.py"), str(file)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert (
        finished.stderr
        == f"error: {tmp_path}/store: no token store: run `ul2r prepare RECIPE` first\n"
    )


def test_tokens_are_shown_as_inside_a_document() -> None:
    """Alone, a token of Llama 2 would lose the space that it begins with."""
    tokenizer = KINDS["Llama 2"]()
    add_special_tokens(tokenizer, num_sentinels=2)
    vocabulary = build_vocabulary(tokenizer)
    ids = encode(tokenizer, "The river sees the sea").tolist()

    shown = render_tokens([*ids, vocabulary.sentinels[0]], tokenizer, vocabulary)

    assert "".join(token.text for token in shown) == " The river sees the sea<extra_id_0>"
