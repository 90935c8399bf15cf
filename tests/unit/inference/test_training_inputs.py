"""Prompts against the rows that the objective builds of the same text, for every setting that changes them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from ul2r.config import Objective, Pairs, Prefix, SpanCorruption
from ul2r.data.prepare.pair_records import PairText
from ul2r.data.prepare.pair_shards import PairEncoder
from ul2r.inference import LanguageModel, complete, infill
from ul2r.objective import Batch, Vocabulary, build_batch
from ul2r.objective.random_kernels import Runs
from ul2r.testing.corpus import SyntheticWindows
from ul2r.testing.models import ScriptedModel, write_tiny_export

TEXT = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


@pytest.fixture(scope="module")
def vocabulary(model: LanguageModel) -> Vocabulary:
    assert model.vocabulary is not None
    return model.vocabulary


@pytest.fixture(
    scope="module", params=product([False, True], repeat=2), ids=lambda flags: str(tuple(flags))
)
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> LanguageModel:
    """Model whose metadata has one of the four combinations of `eos_after_inputs` and `prefix_sentinel`."""
    eos_after_inputs, prefix_sentinel = request.param
    folder: Path = tmp_path_factory.mktemp("exports") / "export"
    write_tiny_export(
        folder,
        texts=["q"],  # nothing to merge
        eos_after_inputs=eos_after_inputs,
        prefix_sentinel=prefix_sentinel,
    )
    return LanguageModel.load(folder)


class OnePair:
    """A `PairSource` of one pair in each slot."""

    max_pairs = 1

    def __init__(self, prompt: list[int], answer: list[int]) -> None:
        self._prompt = prompt
        self._answer = answer

    def read(
        self,
        numbers: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],
        windows: npt.NDArray[np.int32],
        runs: Runs,
    ) -> None:
        """Write the pair to each slot."""
        size = len(self._prompt) + len(self._answer)
        assert (numbers >= 0).all()
        lengths[:] = size
        windows[:, :size] = [*self._prompt, *self._answer]
        runs.num_spans[:] = 1
        runs.kept[:, 0] = len(self._prompt)
        runs.masked[:, 0] = len(self._answer)


@pytest.mark.parametrize(("prompt", "answer"), [("What is q?", " zero"), (" ab\n", "C[S2S]")])
def test_a_completion_of_a_prompt_reads_what_its_pair_was_trained_on(
    model: LanguageModel, vocabulary: Vocabulary, tmp_path: Path, prompt: str, answer: str
) -> None:
    model.tokenizer.save(str(tmp_path / "tokenizer.json"))
    encoder = PairEncoder(tmp_path / "tokenizer.json", vocabulary)
    encoded = encoder.encode(PairText([(prompt, answer)], prompt, is_chat=False, locate=str))
    assert encoded is not None
    denoiser = Pairs(weight=1, sentinel=model.metadata.prefix_sentinel)
    batch = build_batch(
        range(1),
        objective=Objective(
            mixture=(denoiser,),
            sequence_length=40,
            eos_after_inputs=model.metadata.eos_after_inputs,
        ),
        vocabulary=vocabulary,
        seed=5,
        text_windows=SyntheticWindows(lambda *_: []),
        pairs=OnePair(*encoded[0]),
    )
    inputs, targets = split_example(batch, 0)
    scripted = ScriptedModel(model, {}, fallback=vocabulary.eos)
    if denoiser.sentinel:
        scripted = ScriptedModel(model, {inputs[-1]: targets[:1]}, fallback=vocabulary.eos)

    complete(scripted, prompt, max_tokens=1)

    assert scripted.calls[0] == inputs
    assert scripted.bidirectional_calls[0]
    text = [token for token in targets if token not in (vocabulary.eos, vocabulary.sentinels[0])]
    assert model.decode_continuation(inputs, text) == answer
    assert targets[-1] == vocabulary.eos


def build_rows(model: LanguageModel, denoiser: SpanCorruption | Prefix) -> Batch:
    """Return rows of `TEXT`, as the model's metadata says that it was trained."""
    ids = model.encode(TEXT)
    assert len(ids) == len(TEXT), "this test needs one token per character"
    assert model.vocabulary is not None
    objective = Objective(
        mixture=(denoiser,),
        sequence_length=60,
        eos_after_inputs=model.metadata.eos_after_inputs,
    )
    return build_batch(
        range(20),
        objective=objective,
        vocabulary=model.vocabulary,
        seed=5,
        text_windows=SyntheticWindows(lambda _, length: ids[:length]),
    )


def split_example(batch: Batch, row: int) -> tuple[list[int], list[int]]:
    """Return inputs and targets of a row's only example."""
    used = int((batch.denoiser_ids[row] >= 0).sum())
    tokens = [*batch.tokens[row, :used].tolist(), int(batch.labels[row, used - 1])]
    num_inputs = int(batch.loss_mask[row].argmax()) + 1
    return tokens[:num_inputs], tokens[num_inputs:]


def repeat_targets(model: LanguageModel, targets: list[int]) -> ScriptedModel:
    """Return a model that generates the targets: none of its tokens is in them twice."""
    assert len(set(targets)) == len(targets)
    script = {token: [following] for token, following in pairwise(targets)}
    return ScriptedModel(model, script, fallback=targets[0])


def split_at_sentinels(ids: list[int], vocabulary: Vocabulary) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for token in ids:
        if token in vocabulary.sentinels:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def test_an_infilling_reads_the_inputs_of_its_row_and_writes_its_targets(
    model: LanguageModel, vocabulary: Vocabulary
) -> None:
    denoiser = SpanCorruption(
        name="R", mean_noise_span_length=3, noise_density=0.15, mode="NLU", weight=1
    )
    batch = build_rows(model, denoiser)
    closing = int(model.metadata.eos_after_inputs)

    for row in range(len(batch)):
        inputs, targets = split_example(batch, row)
        text = inputs[1 : len(inputs) - closing]
        parts = [model.decode(part) for part in split_at_sentinels(text, vocabulary)]
        scripted = repeat_targets(model, targets)

        result = infill(scripted, parts)

        assert scripted.calls[0] == inputs
        # Of the targets eos alone is not read again: nothing follows it.
        assert scripted.targets == targets[:-1]
        assert TEXT.startswith(result.text)
        assert result.prompt_tokens + result.completion_tokens == len(inputs) + len(targets)


def test_a_completion_reads_the_inputs_of_its_row_and_writes_its_targets(
    model: LanguageModel,
) -> None:
    batch = build_rows(model, Prefix(weight=1, sentinel=model.metadata.prefix_sentinel))
    closing = model.metadata.prefix_sentinel + model.metadata.eos_after_inputs

    for row in range(len(batch)):
        inputs, targets = split_example(batch, row)
        prompt = model.decode(inputs[1 : len(inputs) - closing])
        scripted = repeat_targets(model, targets)
        # Without a sentinel the last input predicts the first target.
        scripted.script = {inputs[-1]: [targets[0]], **scripted.script}

        result = complete(scripted, prompt)

        assert scripted.calls[0] == inputs
        assert scripted.targets == targets[:-1]
        assert TEXT.startswith(prompt + result.text)
        assert result.prompt_tokens + result.completion_tokens == len(inputs) + len(targets)


@pytest.mark.parametrize("mode", ["NLU", "NLG"])
def test_other_modes_close_the_prompt_likewise(
    model: LanguageModel, vocabulary: Vocabulary, mode: str
) -> None:
    ask: Callable[..., object] = complete
    scripted = ScriptedModel(model, {}, fallback=model.encode("q")[0])

    ask(scripted, "ab", mode=mode, max_tokens=1)

    end = [vocabulary.eos] if model.metadata.eos_after_inputs else []
    expected = [*vocabulary.modes[mode], *model.encode("ab"), vocabulary.sentinels[0], *end]
    assert scripted.calls[0] == expected


def test_rows_differ_between_the_settings(model: LanguageModel) -> None:
    """Otherwise the tests above would pass without the settings."""
    batch = build_rows(model, Prefix(weight=1, sentinel=model.metadata.prefix_sentinel))
    inputs, targets = split_example(batch, 0)
    assert model.vocabulary is not None

    assert (inputs[-1] == model.vocabulary.eos) == model.metadata.eos_after_inputs
    assert (targets[0] in model.vocabulary.sentinels) == model.metadata.prefix_sentinel
    assert np.all(batch.loss_mask.sum(axis=1) > 0)
