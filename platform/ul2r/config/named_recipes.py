"""Recipes that come with the package, which are found by their names."""

from __future__ import annotations

import difflib
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
FOLDERS = (PACKAGE / "recipes", PACKAGE.parents[1] / "jobs/recipes")
"""Their folder in a wheel (pyproject.toml), and in a checkout."""
SUFFIX = ".yaml"
MAX_SUGGESTIONS = 3


def list_named_recipes() -> dict[str, Path]:
    """Return the files of the package's recipes, runs, comparisons and shared settings, by sorted name."""
    folder = next((folder for folder in FOLDERS if folder.is_dir()), None)
    return {path.stem: path for path in sorted(folder.glob(f"*{SUFFIX}"))} if folder else {}


def is_named_recipe(path: Path) -> bool:
    """Return whether a file is a recipe of the package, which its name alone finds."""
    return path in list_named_recipes().values()


def find_recipe(path: Path, folder: Path) -> Path:
    """Return the file that a recipe is named by.

    A bare name such as demo-base is the file of that name in `folder`, or that name with .yaml, or else the recipe of
    the package.

    Args:
        path: A path relative to `folder`, or a bare name.
        folder: Folder of the file that names it, or the working directory.

    Returns:
        The file; the path itself, which does not exist, for a name that is not known.
    """
    file = folder / path
    if not _is_bare_name(path) or file.is_file():
        return file
    sibling = folder / f"{path}{SUFFIX}"
    return sibling if sibling.is_file() else list_named_recipes().get(str(path), file)


def suggest_recipe(path: Path) -> str:
    """Return what to write in place of a missing file, as the end of a message; empty if no name is near."""
    names = list_named_recipes()
    if path.suffix == SUFFIX and path.stem in names:
        return (
            f"; the recipe that comes with ul2r is called {path.stem}, without folder and {SUFFIX}"
        )
    if not path.suffix and (
        nearest := difflib.get_close_matches(path.name, names, n=MAX_SUGGESTIONS, cutoff=0.5)
    ):
        return f"; did you mean {' or '.join(nearest)}, which `ul2r recipes` lists?"
    return ""


def _is_bare_name(path: Path) -> bool:
    return path.name == str(path) and not path.suffix
