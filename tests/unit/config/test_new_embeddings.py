"""First values of new embedding rows: refused where there can be none."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from ul2r.config import Recipe
from ul2r.config.validation_errors import explain
from ul2r.testing.recipes import tiny_recipe


@pytest.mark.parametrize("base", [None, "other"])
def test_a_base_that_can_have_no_new_rows_is_refused(base: str | None) -> None:
    with pytest.raises(ValidationError) as caught:
        tiny_recipe(Path("none"), base=base, training={"new_embeddings": "mean_plus_noise"})
    assert explain(caught.value, Recipe) == (
        "training.new_embeddings=mean_plus_noise is for a base in another format, whose tokenizer may gain tokens: "
        "set base to {hf: ...} or {megatron: ...}, or leave the setting out"
    )


def test_rare_subwords_of_a_base_without_a_tokenizer_are_refused() -> None:
    training = {"new_embeddings": "rare_subwords"}
    with pytest.raises(ValidationError) as caught:
        tiny_recipe(Path("none"), base={"megatron": "folder"}, training=training)
    assert explain(caught.value, Recipe) == (
        "training.new_embeddings=rare_subwords needs a tokenizer, which base.megatron has not: set it to "
        "mean_plus_noise or mean"
    )
    assert tiny_recipe(Path("none"), base={"hf": "folder"}, training=training).base is not None
