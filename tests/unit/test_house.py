"""Rules that no linter checks: forbidden names, sizes, style, versions, recipes."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import ul2r
from ul2r.config import Comparison, HuggingFaceBase, Recipe, load

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "jobs/recipes"
CODE = ("platform", "jobs", "serving", "benchmarks", "tests")
MAX_FILE_LINES = 400
STYLED_CODE = ("platform/ul2r", "jobs", "serving")
"""Folders whose style is checked; tests and benchmarks are freer."""
MAX_FUNCTION_LINES = 80
MAX_PARALLEL_ASSIGNMENTS = 1.0
"""Per 1,000 lines."""


def _python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def test_nothing_shadows_pythons_own_platform_module() -> None:
    assert not (ROOT / "platform/__init__.py").exists()
    assert not (ROOT / "tests/platform").exists()
    script = "import platform, uuid; print(platform.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert not Path(found.strip()).is_relative_to(ROOT / "platform")


def test_test_folders_are_not_packages() -> None:
    """In pytest's importlib mode a package called tests.unit.data would shadow the library's own names."""
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_no_module_of_the_library_is_named_like_one_of_the_standard_library() -> None:
    library = ROOT / "platform/ul2r"
    names = {path.stem for path in library.rglob("*.py")} | {
        path.name for path in library.iterdir() if path.is_dir()
    }
    assert not (names - {"__init__", "__pycache__"}) & sys.stdlib_module_names


def test_there_is_no_catch_all_module() -> None:
    names = {path.stem for path in _python_files("platform", "jobs", "serving")}
    assert not names & {"utils", "util", "helpers", "common", "misc"}


def test_files_are_short_enough_to_read() -> None:
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in _python_files(*CODE)
    }
    assert {path: length for path, length in lengths.items() if length > MAX_FILE_LINES} == {}


def _nodes() -> Iterator[tuple[str, ast.AST]]:
    """Yield each node of the styled code, with its file and line."""
    for path in _python_files(*STYLED_CODE):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            yield f"{path.relative_to(ROOT).as_posix()}:{getattr(node, 'lineno', 1)}", node


def test_a_test_replaces_the_clock_of_a_module_not_of_the_process() -> None:
    # A server's thread that reads a replaced `time.monotonic` may sleep for as long as the machine has been up.
    replaced = re.compile(
        r"setattr\(\s*([\w.]*\btime,|\"[\w.]*\btime\.)|^\s*time\.\w+ = ", re.MULTILINE
    )
    found = [path for path in _python_files("tests") if replaced.search(path.read_text())]
    assert found == []


def test_docstrings_do_not_begin_with_a_question_word() -> None:
    """A function's docstring is an imperative ("Return ..."), that of a class or property a noun phrase."""
    documented = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)
    wrong = [
        f"{place} {docstring.splitlines()[0]}"
        for place, node in _nodes()
        if isinstance(node, documented)
        and (docstring := ast.get_docstring(node))
        and re.match(r"(What|Whether|Where|Which|How|Those)\b", docstring)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_variable_is_called_one() -> None:
    """It does not say of what; a loop over shards has a variable `shard`."""
    wrong = [
        place
        for place, node in _nodes()
        if (isinstance(node, ast.Name) and node.id == "one")
        or (isinstance(node, ast.arg) and node.arg == "one")
    ]
    assert not wrong, "\n".join(wrong)


def test_functions_are_short_enough_to_read() -> None:
    lengths = {
        f"{place} {node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for place, node in _nodes()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: length for name, length in lengths.items() if length > MAX_FUNCTION_LINES} == {}


def test_parallel_assignments_are_rare() -> None:
    """One assignment per line; `a, b = x, y` is for swaps."""
    parallel = [
        place
        for place, node in _nodes()
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Tuple)
        and isinstance(node.value, ast.Tuple)
    ]
    num_lines = sum(
        len(path.read_text(encoding="utf-8").splitlines()) for path in _python_files(*STYLED_CODE)
    )
    assert 1000 * len(parallel) / num_lines <= MAX_PARALLEL_ASSIGNMENTS, "\n".join(parallel)


def test_version_is_the_same_everywhere() -> None:
    assert importlib.metadata.version("ul2r") == ul2r.__version__
    assert f"## {ul2r.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("job", sorted(path.name for path in (ROOT / "jobs").glob("[a-z]*.py")))
def test_docstring_of_a_job_holds_the_command_that_runs_it(job: str) -> None:
    docstring = ast.get_docstring(ast.parse((ROOT / "jobs" / job).read_text(encoding="utf-8")))
    assert f"python jobs/{job}" in (docstring or "")


PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "clusters/README.md")
DOCUMENTS = [*PAGES, *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_in_a_document_name_jobs_and_recipes_that_load(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8").replace("\\\n", " ")
    for job in re.findall(r"python (jobs/\w+\.py)", text):
        assert (ROOT / job).is_file(), job
    for recipe, overrides in re.findall(r"(jobs/recipes/[\w.-]+\.yaml)((?: +--set \S+)*)", text):
        kind = Comparison if recipe.endswith("-compare.yaml") else Recipe
        load(ROOT / recipe, re.findall(r"--set (\S+)", overrides), kind)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_in_a_document_lead_to_files_and_headings(document: str) -> None:
    path = ROOT / document
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://")):
            continue
        file, _, heading = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        if heading:
            assert heading in _heading_ids(target), link


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if name != "CHANGELOG.md"])
def test_source_files_named_in_a_document_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    files = re.findall(r"`([\w/.-]+/[\w.-]+\.(?:py|yaml|sbatch))`", text)
    roots = (ROOT, ROOT / "platform/ul2r")
    assert [file for file in files if not any((root / file).is_file() for root in roots)] == []


def _heading_ids(document: Path) -> set[str]:
    """Return the ids that GitHub gives the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_table_of_recipe_keys_lists_each_section_with_the_file_of_its_defaults() -> None:
    page = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*`) \| .* \| (`.*`) \|$", page, re.MULTILINE)
    files = {
        key: re.findall(r"`(\S+)`", row[1])
        for row in rows
        for key in re.findall(r"`(\w+)`", row[0])
    }
    assert list(files) == [*dict.fromkeys(files)]
    assert set(files) == set(Recipe.model_fields)
    for key, names in files.items():
        section = type(Recipe.model_fields[key].default)
        module = section.__module__.removeprefix("ul2r.config.")
        if section.__module__.startswith("ul2r.config."):
            assert f"{module}.py" in names, key
        assert all((ROOT / "platform/ul2r/config" / name).is_file() for name in names), key


# Recipes. A family is one storage folder; `demo.yaml` holds the settings that its runs share and is only extended.


def _load_yaml(path: Path) -> dict[str, Any]:
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(tree, dict)
    return tree


def _list_recipes(kind: str) -> list[str]:
    """Return the names of the recipe files of a kind: "run", "comparison", "ladder" or "shared" settings."""
    trees = {path.name: _load_yaml(path) for path in sorted(RECIPES.glob("*.yaml"))}
    kinds = {
        name: "comparison"
        if "recipes" in tree
        else "ladder"
        if "arms" in tree
        else "run"
        if "name" in tree
        else "shared"
        for name, tree in trees.items()
    }
    return [name for name in kinds if kinds[name] == kind]


def _fill_model(tree: dict[str, Any]) -> None:
    """Give a recipe whose base is in Hugging Face format, and not here, a model of any shape."""
    if isinstance(tree.get("base"), dict):
        tree["model"] = {
            "num_layers": 1,
            "hidden_size": 64,
            "ffn_hidden_size": 64,
            "num_heads": 2,
            "num_kv_heads": 2,
        }


@pytest.mark.parametrize("name", _list_recipes("run"))
def test_recipe_loads_and_is_named_like_its_file_and_family(name: str) -> None:
    recipe = load(RECIPES / name, (), Recipe, _fill_model)
    assert f"{recipe.name}.yaml" == name
    assert recipe.role is not None
    family = recipe.storage.name
    if recipe.base == family:  # a base that these recipes do not train
        assert recipe.name == (
            f"u-{family}" if recipe.role == "ul2r" else f"{family}-{recipe.role}"
        )
        return

    assert recipe.name.removesuffix(f"-seed{recipe.seed}") == f"{family}-{recipe.role}"
    if isinstance(recipe.base, HuggingFaceBase):
        assert recipe.base.hf == "runs/smollm2/base"
    else:
        assert recipe.base == (None if recipe.role == "base" else f"{family}-base")


def _load_run(comparison: Comparison, role: str) -> Recipe:
    path = comparison.recipes[role]
    assert isinstance(path, Path)
    return load(path, (), Recipe, _fill_model)


@pytest.mark.parametrize("name", _list_recipes("comparison"))
def test_comparison_loads_and_names_a_recipe_of_each_role(name: str) -> None:
    comparison = load(RECIPES / name, (), Comparison)
    assert f"{comparison.name}.yaml" == name
    runs = {
        role: _load_run(comparison, role)
        for role, entry in comparison.recipes.items()
        if isinstance(entry, Path)
    }
    assert {role: run.role for role, run in runs.items()} == {
        role: role.partition("-")[0] for role in runs
    }
    assert {run.storage for run in runs.values()} == {comparison.storage}
    assert {run.tracking.experiment for run in runs.values()} == {comparison.tracking.experiment}


@pytest.mark.parametrize("name", _list_recipes("comparison"))
def test_runs_of_a_comparison_differ_only_in_what_is_compared(name: str) -> None:
    comparison = load(RECIPES / name, (), Comparison)
    ul2r_run, control = (_load_run(comparison, role) for role in ("ul2r", "control"))
    own = {"name", "role", "objective", "export"}
    assert control.model_dump(exclude=own) == ul2r_run.model_dump(exclude=own)
    assert control.objective.sequence_length == ul2r_run.objective.sequence_length


def test_shared_settings_are_used() -> None:
    extended = {_load_yaml(path).get("extends") for path in RECIPES.glob("*.yaml")}
    assert set(_list_recipes("shared")) <= extended
