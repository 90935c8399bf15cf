"""Few-shot tasks: in what form a model reads them, and which of their items."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ul2r.config.denoisers import Mode
from ul2r.config.field_types import PositiveInt
from ul2r.config.strict_model import StrictModel

Reading = Literal["auto", "both", "fim", "left"]


class Prompting(StrictModel):
    """The form in which a model reads a context and the text that follows it; recorded with every result."""

    mode: Literal["auto", "none"] | Mode = "auto"
    """Mode in front of the context; auto is S2S for a model trained on denoisers, and none for any other."""
    attention: Literal["auto", "prefix", "causal"] = "auto"
    """Attention over the context: prefix is bidirectional. auto is as the model was trained, and causal without a
    mode."""
    sentinel: Literal["auto"] | bool = "auto"
    """End the context with a sentinel, and begin what follows with it, as the paper prompts R and X. auto is true for
    NLU and NLG, and for S2S if the model was trained so."""
    trailing_space: Literal["continuation", "context"] = "continuation"
    """Side that spaces at the end of a context count for: the continuation, as lm-eval has it, or the context."""
    eos: bool = False
    """Score an eos after each continuation as well, as T5's rank classification does."""


class FewShot(Prompting):
    """Few-shot suites: with some, `ul2r evaluate` runs these and nothing else."""

    suites: tuple[str, ...] = ()
    """Suites to run, by name or as files."""
    tasks: tuple[str, ...] = ()
    """Lines of the suites that are run; by default all."""
    model: str | None = None
    """Model that is run in place of the run's export: a causal model in Hugging Face format, by its folder or its name
    on the Hub."""
    skip_missing: bool = False
    """Leave out tasks whose data is missing; by default they are an error."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (1234,)
    """Seeds of the few-shot examples; a task without examples is run once."""
    limit: PositiveInt | None = None
    """First items of each task that are run; by default all."""
    reading: Reading = "auto"
    """The part of a text to infill that a model sees: both sides with a sentinel between them, both in the layout of
    fim, or the left one alone, causally and without a mode; auto is the first of these that it was trained for."""
    samples: PositiveInt = 1
    """Texts that are written for each gap of an infilling suite, whose scores are averaged."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Of the texts written for gaps; 0 is greedy."""

    @model_validator(mode="after")
    def _check_samples(self) -> Self:
        if self.samples > 1 and not self.temperature:
            raise ValueError(
                f"samples={self.samples} at temperature=0 are all the same: set temperature, such as 0.2, or samples=1"
            )
        return self
