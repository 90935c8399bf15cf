"""Imports point down, and each heavy library stays in its place (ARCHITECTURE of the project, CONTRIBUTING.md).

Read from the source, so that an import inside a function or under TYPE_CHECKING counts as well.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

LAYERS: tuple[frozenset[str], ...] = tuple(
    frozenset(line.split())
    for line in (
        "errors console filesystem paths",
        "config",
        "objective tracking",
        "data model",
        "train inference",
        "evaluation",
        "launch",
        "workflows",
        "testing",
        "serving",
        "jobs",
        "benchmarks tests",
    )
)
"""From the lowest up. Parts on one line do not know each other; only tests and benchmarks may know `testing`."""

PLACES = {
    "ray": (
        "data/loader",
        "data/prepare/tokenize_shards",
        "launch/ray_train/",
        "workflows/",
        "jobs/",
        "serving/",
        "benchmarks/",
    ),
    "mlflow": ("tracking/",),
    "megatron": ("model/", "train/", "testing/"),
    "transformers": ("model/", "inference/", "testing/"),
}
"""Where in the library, the jobs and the application a third-party package may be imported."""

ONLY = {
    "config": {"pydantic", "yaml"},
    "objective": {"numba", "numpy"},
    "errors": set[str](),
    "console": {"rich"},
}
"""Parts that import no other third-party package than these."""


def _sources() -> list[Path]:
    folders = [ROOT / name for name in ("platform/ul2r", "jobs", "serving", "benchmarks")]
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def _place(source: Path) -> str:
    """`data/store/token_store` for platform/ul2r/data/store/token_store.py, `jobs/train` for jobs/train.py."""
    relative = source.relative_to(ROOT).with_suffix("").as_posix()
    return relative.removeprefix("platform/ul2r/")


def _imported(source: Path) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of each module that the file imports."""
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "ul2r":
                yield from ((node.lineno, f"ul2r.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module


def _part(dotted: str) -> str | None:
    """The part of this project that a module belongs to; None for somebody else's."""
    first, *rest = dotted.split(".")
    if first == "ul2r":
        return rest[0] if rest else "errors"
    return first if first in {"jobs", "serving", "benchmarks", "tests"} else None


def _layer(part: str) -> int:
    return next(height for height, parts in enumerate(LAYERS) if part in parts)


def _third_party(dotted: str) -> str | None:
    first = dotted.partition(".")[0]
    if first in sys.stdlib_module_names or _part(dotted) is not None:
        return None
    return first


def test_every_part_of_the_library_has_a_layer() -> None:
    library = ROOT / "platform/ul2r"
    parts = {path.stem for path in library.iterdir() if path.suffix == ".py" or path.is_dir()}
    known = frozenset().union(*LAYERS)
    assert parts - {"__init__", "__pycache__"} <= known


def test_imports_point_down() -> None:
    wrong = []
    for source in _sources():
        place = _place(source)
        own = place.partition("/")[0]
        if own == "__init__":
            own = "errors"
        for line, dotted in _imported(source):
            part = _part(dotted)
            if part is None or part == own:
                continue
            private = part == "testing" and own != "benchmarks"
            if private or _layer(part) >= _layer(own):
                wrong.append(f"{source.relative_to(ROOT)}:{line} imports {dotted}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", PLACES)
def test_package_stays_in_its_place(package: str) -> None:
    wrong = [
        f"{source.relative_to(ROOT)}:{line}"
        for source in _sources()
        if not _place(source).startswith(PLACES[package])
        for line, dotted in _imported(source)
        if _third_party(dotted) == package
    ]
    assert not wrong, f"{package} may be imported in {PLACES[package]} only, not in {wrong}"


@pytest.mark.parametrize("part", ONLY)
def test_light_part_imports_nothing_heavy(part: str) -> None:
    imported = {
        package
        for source in _sources()
        if _place(source).partition("/")[0] == part
        for _, dotted in _imported(source)
        if (package := _third_party(dotted)) is not None
    }
    assert imported <= ONLY[part]


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("ul2r.config ul2r.console", "numpy torch ray mlflow megatron transformers"),
        ("ul2r.objective.batch", "torch ray mlflow megatron transformers"),
        ("ul2r.tracking.tracker", "torch ray megatron transformers"),
        ("ul2r.data.sampling.batches", "ray mlflow megatron transformers"),
        ("ul2r.train.loop", "ray mlflow transformers"),
        ("ul2r.inference.language_model", "ray mlflow megatron"),
    ],
)
def test_importing_a_part_loads_no_library_that_it_does_not_need(modules: str, absent: str) -> None:
    """What the source says is one thing; what really gets loaded, through packages' __init__, another."""
    script = (
        f"import {', '.join(modules.split())}, sys; "
        f"print(*[name for name in {absent.split()} if name in sys.modules])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == []


def test_reader_of_imports_sees_every_form(tmp_path: Path) -> None:
    source = tmp_path / "example.py"
    source.write_text(
        "import os, ray.data\n"
        "from ul2r import errors\n"
        "from ul2r.train.loop import TrainLoop\n"
        "def late() -> None:\n"
        "    import mlflow as m\n"
    )
    assert {dotted for _, dotted in _imported(source)} == {
        "os",
        "ray.data",
        "ul2r.errors",
        "ul2r.train.loop",
        "mlflow",
    }
