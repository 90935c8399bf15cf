"""Scores of gaps on disk are what was measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ul2r.config.gaps import GapSettings
from ul2r.data.store.dataset import TokenDataset
from ul2r.evaluation.gaps import measure_gaps, select_gaps
from ul2r.evaluation.gaps.items import read_items, write_items
from ul2r.inference import LanguageModel


@pytest.mark.parametrize("generate", [False, True])
def test_scores_read_back_equal_those_written(
    ul2r_model: LanguageModel, dataset: TokenDataset, tmp_path: Path, *, generate: bool
) -> None:
    settings = GapSettings(lengths=(1, 3), slots=(2, 1), num_gaps=4, context_length=6)
    groups = select_gaps(dataset, settings)
    measured = list(measure_gaps(ul2r_model, groups, generate=generate))
    write_items(tmp_path / "gaps/items.parquet", measured)

    read = read_items(tmp_path / "gaps/items.parquet")
    assert len(read) == len(measured) == 8
    for found, scores in zip(read, measured, strict=True):
        assert (found.name, found.reading) == (scores.name, scores.reading)
        assert (found.hashes, found.targets) == (scores.hashes, scores.targets)
        assert np.array_equal(found.origins, scores.origins)
        assert found.summarize() == scores.summarize()
        # The same gaps, of which one is the other: no difference at all.
        assert all(pair.difference.mean == 0 for pair in found.compare(scores).values())
        assert ("exact_match" in found.summarize()) == generate
        if scores.written is not None:
            assert found.written is not None
            assert found.written.answers == scores.written.answers
