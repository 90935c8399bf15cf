"""The recipe that a run was trained with, in its folder: the file may have been edited since, or read with `--set`."""

from __future__ import annotations

import logging

from ul2r.config.load import dump, load
from ul2r.config.recipe import Recipe
from ul2r.errors import RecipeError
from ul2r.filesystem import write_atomically

logger = logging.getLogger(__name__)


def record_recipe(recipe: Recipe) -> None:
    """Keep the recipe of a start of training, in place of that of the last start; warn if the precision is another one.

    A run may go on with another layout, which changes rounding alone; another precision changes more.
    """
    before = read_recorded_recipe(recipe)
    if before.precision != recipe.precision:
        logger.warning(
            "%s was trained in %s until here and goes on in %s: set training.precision=%s to continue it as it began",
            recipe.name,
            before.precision,
            recipe.precision,
            before.precision,
        )
    write_atomically(recipe.paths.recorded_recipe, dump(recipe))


def read_recorded_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe of the last start of a run's training; `recipe` itself where there is none that can be read.

    Runs of older versions have none, nor have those whose weights come from Megatron-LM.
    """
    file = recipe.paths.recorded_recipe
    if not file.is_file():
        return recipe
    try:
        return load(file, (), Recipe)
    except RecipeError as error:
        logger.warning("the recipe as it is now counts for what was trained: %s", error)
        return recipe
