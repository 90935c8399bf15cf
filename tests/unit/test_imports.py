"""Imports point down, and each heavy library stays in its place (see "Layout" in CONTRIBUTING.md).

Read from the source, so an import inside a function or under TYPE_CHECKING counts as well.
"""

from __future__ import annotations

import ast
import functools
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / "platform/ul2r"
JOBS = sorted(path.stem for path in (ROOT / "jobs").glob("[!_]*.py"))

LAYERS: tuple[frozenset[str], ...] = tuple(
    frozenset(line.split())
    for line in (
        "errors child_process console environment filesystem paths",
        "config",
        "objective tracking",
        "data model",
        "train inference",
        "evaluation",
        "launch",
        "workflows",
        "testing",
        "serving",
        "commands",
        "__main__ jobs",
        "benchmarks tests",
    )
)
"""From the bottom up. Parts on one line do not import each other; only tests and benchmarks may import `testing`."""

ROOMS: dict[str, tuple[frozenset[str], ...]] = {
    part: tuple(frozenset(line.split()) for line in lines)
    for part, lines in {
        "data": (
            "tokenizer",
            "special_tokens document_tokenizer chat_template",
            "store",
            "prepare sampling",
            "*",
        ),
        "model": ("window", "attention", "*", "huggingface"),
        "train": (
            "mesh state optimizer transfer monitor/guards",
            "step waiting",
            "callbacks",
            "checkpoint monitor",
            "*",
        ),
        "launch": ("*", "ray_train"),
    }.items()
}
"""Layers inside a part: its sub-packages and modules from the bottom up; `*` stands for all modules not named.

Names on one line do not import each other; modules of one sub-package may, and those under `*`.
"""

PLACES = {
    "fastapi": ("serving/",),
    "fsspec": ("data/store/remote", "train/checkpoint/remote"),
    "gguf": ("model/huggingface/gguf_file",),
    "httpx": (
        "tracking/",
        "testing/soak/",
        "commands/",
        "jobs/",
        "serving/",
        "benchmarks/served_gaps",
        "benchmarks/serving_load",
    ),
    "datasets": ("evaluation/few_shot/task_loading",),
    "lm_eval": ("commands/harness", "evaluation/few_shot/"),
    "megatron": ("model/", "train/", "testing/", "benchmarks/startup"),
    "mlflow": ("tracking/",),
    "numba": ("objective/",),
    "psutil": (
        "train/monitor/",
        "tracking/proxies",
        "testing/ray_cluster",
        "testing/soak/",
        "benchmarks/",
    ),
    "pyarrow": ("data/prepare/", "evaluation/few_shot/", "evaluation/gaps/"),
    "pynvml": ("train/monitor/",),
    "ray": (
        "data/loader",
        "data/prepare/ray_tasks",
        "launch/ray_train/",
        "workflows/",
        "commands/",
        "jobs/",
        "serving/",
        "benchmarks/",
    ),
    "safetensors": ("model/huggingface/", "inference/", "testing/exports", "benchmarks/"),
    "transformers": (
        "data/chat_template",
        "model/huggingface/",
        "inference/",
        "testing/",
        "benchmarks/served_gaps",
        "benchmarks/serving_load",
    ),
}
"""Rooms and modules of the library, the jobs and the application that may import a third-party package."""

ONLY = {
    "config": {"pydantic", "yaml"},
    "objective": {"numba", "numpy"},
    "child_process": set[str](),
    "environment": set[str](),
    "errors": set[str](),
    "filesystem": set[str](),
    "paths": set[str](),
    "console": {"rich"},
}
"""Parts that import no other third-party package than these."""


def _sources() -> list[Path]:
    folders = [LIBRARY, *(ROOT / name for name in ("jobs", "serving", "benchmarks"))]
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def _place(source: Path) -> str:
    """Return `data/store/token_store` for platform/ul2r/data/store/token_store.py, `jobs/train` for jobs/train.py."""
    relative = source.relative_to(ROOT).with_suffix("").as_posix()
    return relative.removeprefix("platform/ul2r/")


@functools.cache
def _imported(source: Path) -> list[tuple[int, str]]:
    """Return line and full dotted name of each module that the file imports."""
    return list(_find_imports(source))


def _find_imports(source: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from ul2r.data.store import dataset` imports a module, `from ul2r.config import Recipe` a name of one.
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name if _is_module(name) else node.module for name in names}
            yield from ((node.lineno, module) for module in sorted(modules))


def _is_module(dotted: str) -> bool:
    path = ROOT / "platform" / dotted.replace(".", "/")
    return path.with_suffix(".py").is_file() or path.is_dir()


def _part(dotted: str) -> str | None:
    """Return the part of this project that a module belongs to, None for a third party's."""
    first, *rest = dotted.split(".")
    if first == "ul2r":
        return rest[0] if rest else "errors"
    return first if first in {"jobs", "serving", "benchmarks", "tests"} else None


def _layer(part: str) -> int:
    return next(height for height, parts in enumerate(LAYERS) if part in parts)


def _room(part: str, module: str) -> tuple[int, str]:
    """Return the height in its part of a module, such as `monitor/guards`, and its name in `ROOMS`."""
    rooms = {room: height for height, names in enumerate(ROOMS[part]) for room in names}
    room = next((room for room in (module, module.partition("/")[0]) if room in rooms), "*")
    return rooms[room], room


def _third_party(dotted: str) -> str | None:
    first = dotted.partition(".")[0]
    if first in sys.stdlib_module_names or _part(dotted) is not None:
        return None
    return first


def test_every_part_of_the_library_has_a_layer() -> None:
    parts = {path.stem for path in LIBRARY.iterdir() if path.suffix == ".py" or path.is_dir()}
    known = frozenset().union(*LAYERS)
    assert parts - {"__init__", "__pycache__"} <= known


def test_imports_point_down() -> None:
    wrong = []
    for source in _sources():
        own = _place(source).partition("/")[0]
        if own == "__init__":
            own = "errors"
        for line, dotted in _imported(source):
            part = _part(dotted)
            if part is None or part == own:
                continue
            is_private = part == "testing" and own != "benchmarks"
            if is_private or _layer(part) >= _layer(own):
                wrong.append(f"{source.relative_to(ROOT)}:{line} imports {dotted}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("part", ROOMS)
def test_imports_inside_a_part_point_down(part: str) -> None:
    wrong = []
    for source in (LIBRARY / part).rglob("*.py"):
        height, own = _room(part, _place(source).partition("/")[2])
        for line, dotted in _imported(source):
            package, _, name = dotted.removeprefix("ul2r.").partition(".")
            if package != part or not name:
                continue
            other_height, other = _room(part, name.replace(".", "/"))
            if other != own and other_height >= height:
                wrong.append(f"{source.relative_to(ROOT)}:{line} imports {dotted}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("part", ROOMS)
def test_every_room_of_a_part_exists(part: str) -> None:
    named = {room for rooms in ROOMS[part] for room in rooms} - {"*"}
    folder = LIBRARY / part
    assert all((folder / name).is_dir() or (folder / f"{name}.py").is_file() for name in named)
    packages = {path.parent.name for path in folder.glob("*/__init__.py")}
    assert packages <= named


def test_modules_of_the_library_do_not_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for source in LIBRARY.rglob("*.py"):
        module = f"ul2r.{_place(source).replace('/', '.')}".removesuffix(".__init__")
        imported = {dotted for _, dotted in _imported(source) if _part(dotted) is not None}
        graph[module] = imported - {module}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


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


@pytest.mark.parametrize("package", PLACES)
def test_every_place_of_a_package_exists(package: str) -> None:
    places = {_place(source) for source in _sources()}
    for allowed in PLACES[package]:
        assert any(place.startswith(allowed) for place in places), allowed


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
        ("ul2r.train.checkpoint.storage", "torch ray mlflow megatron transformers"),
        ("ul2r.train.loop", "ray mlflow transformers torch._inductor.compile_fx"),
        (" ".join(JOBS), "numpy numba torch ray mlflow transformers pandas lm_eval datasets"),
        ("serving.arguments", "numpy torch ray mlflow fastapi"),
        ("ul2r.inference.language_model", "ray mlflow megatron lm_eval datasets"),
        ("ul2r.evaluation.measure", "ray mlflow lm_eval datasets"),
    ],
)
def test_importing_a_part_loads_no_library_that_it_does_not_need(modules: str, absent: str) -> None:
    """The source does not show what packages load in their __init__, so this imports for real."""
    script = (
        f"import {', '.join(modules.split())}, sys; "
        f"print(*[name for name in {absent.split()} if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT / "jobs",
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


def test_reader_of_imports_sees_every_form(tmp_path: Path) -> None:
    source = tmp_path / "example.py"
    source.write_text(
        "import os, ray.data\n"
        "from ul2r import errors\n"
        "from ul2r.data.store import dataset\n"
        "from ul2r.train.loop import Trainer\n"
        "def late() -> None:\n"
        "    import mlflow as m\n"
    )
    assert {dotted for _, dotted in _imported(source)} == {
        "os",
        "ray.data",
        "ul2r.errors",
        "ul2r.data.store.dataset",
        "ul2r.train.loop",
        "mlflow",
    }


def test_every_folder_of_unit_tests_mirrors_a_room() -> None:
    tests = ROOT / "tests/unit"
    rooms = {path.parent.relative_to(LIBRARY) for path in LIBRARY.rglob("__init__.py")}
    folders = {path.parent.relative_to(tests) for path in tests.rglob("test_*.py")}
    assert folders <= rooms | {Path("serving")}
