"""The runs of a ladder, each with a recipe of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from ul2r.config import Recipe, load
from ul2r.config.ladder import BASE, Ladder
from ul2r.config.layers import Layer, nest_dotted_keys
from ul2r.errors import RecipeError
from ul2r.launch.pretrained import fill_model_from_base


@dataclass(frozen=True)
class LadderRun:
    """One run of a ladder.

    Attributes:
        recipe: Its recipe.
        size: Name of its size.
        budget: Steps of its base, or its own if it is one.
        seed: Its seed.
        arm: Name of its arm.
    """

    recipe: Recipe
    size: str
    budget: int
    seed: int
    arm: str

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.recipe.name

    @property
    def base(self) -> str | None:
        """Name of the run that has to be finished first, if any."""
        return self.recipe.base if isinstance(self.recipe.base, str) else None


@dataclass(frozen=True)
class _Rung:
    """Size, budget and seed that a base and the arms that continue it share."""

    ladder: Ladder
    size: str
    budget: int
    seed: int

    def name(self, arm: str) -> str:
        return f"{self.ladder.name}-{self.size}-{self.budget}-s{self.seed}-{arm}"

    def plan(self, arm: str, own: dict[str, Any]) -> LadderRun:
        """Load an arm's recipe with the settings of the size, then those of the run, laid over it."""
        ladder = self.ladder
        settings = {
            "storage": str(ladder.storage),
            "tracking": ladder.tracking.model_dump(mode="json"),
            "export.registered_model": None,
            "name": self.name(arm),
            "seed": self.seed,
            **own,
        }
        layers = (
            Layer(f"{ladder.file}: sizes.{self.size}", ladder.sizes[self.size]),
            Layer(str(ladder.file), nest_dotted_keys(settings)),
        )
        recipe = load(ladder.arms[arm], (), Recipe, fill_model_from_base, layers)
        return LadderRun(recipe, self.size, self.budget, self.seed, arm)


def plan_ladder(ladder: Ladder) -> list[LadderRun]:
    """Return all runs of a ladder; each comes after the run that it continues.

    Raises:
        RecipeError: If a recipe is wrong, or arms continue the base for different numbers of tokens.
    """
    runs: list[LadderRun] = []
    for size, seed in product(ladder.sizes, ladder.seeds):
        before: _Rung | None = None
        for budget in ladder.budgets:
            rung = _Rung(ladder, size, budget, seed)
            base = _plan_base(rung, before)
            others = [_plan_continuation(rung, arm, base) for arm in ladder.arms if arm != BASE]
            _check_same_tokens(others)
            runs += [base, *others]
            before = rung
    return runs


def _plan_base(rung: _Rung, before: _Rung | None) -> LadderRun:
    """Plan a base, which goes on from that of the budget before if its schedule allows it."""
    run = rung.plan(BASE, {"training.steps": rung.budget})
    if run.base is not None:
        raise RecipeError(
            f"arms.base: its recipe continues run {run.base!r}, which is none of the ladder's: remove its base, or "
            "name a Hugging Face model"
        )
    if before is None or run.recipe.optimizer.schedule != "constant":
        return run
    goes_on = {
        "base": before.name(BASE),
        "training.steps": rung.budget - before.budget,
        "optimizer.load_optimizer_state": True,
        "optimizer.warmup_fraction": 0,
        "data.continue_from_base": True,
    }
    return rung.plan(BASE, goes_on)


def _plan_continuation(rung: _Rung, arm: str, base: LadderRun) -> LadderRun:
    own: dict[str, Any] = {"base": base.name}
    run = rung.plan(arm, own)
    fraction = rung.ladder.extra_fraction
    if fraction is None:
        return run
    tokens = fraction * rung.budget * base.recipe.tokens_per_step
    own["training.steps"] = max(1, math.ceil(tokens / run.recipe.tokens_per_step))
    return rung.plan(arm, own)


def _check_same_tokens(runs: Sequence[LadderRun]) -> None:
    """Refuse arms that continue the base for different numbers of tokens.

    Raises:
        RecipeError: If there are some.
    """
    first, *others = runs
    tokens = _count_tokens(first.recipe)
    for run in others:
        if _count_tokens(run.recipe) != tokens:
            raise RecipeError(
                f"arms.{run.arm}: continues the base for {_count_tokens(run.recipe):,} tokens, {first.arm} for "
                f"{tokens:,}: give both the same training.steps and batches, or set extra_fraction"
            )


def _count_tokens(recipe: Recipe) -> int:
    return recipe.training.steps * recipe.tokens_per_step


def find_ready(
    waiting: Sequence[LadderRun], finished: set[str], failed: set[str]
) -> Iterator[LadderRun]:
    """Yield the waiting runs whose base is finished, bases first since others wait for them.

    Args:
        waiting: Runs that are not begun.
        finished: Names of runs.
        failed: Names of runs that those who continue them wait for in vain.
    """
    ready = [
        run
        for run in waiting
        if run.base is None or (run.base in finished and run.base not in failed)
    ]
    yield from sorted(ready, key=lambda run: run.arm != BASE)
