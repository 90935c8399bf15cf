"""The rule of `ul2r.objective.compiled`, for numba's disk cache: compiled functions use their own module only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import ul2r

LIBRARY = Path(ul2r.__file__).parent
COMPILED_MODULES = ["objective/layout_kernels.py", "objective/random_kernels.py"]


def imports_of(path: Path) -> set[str]:
    """Return the imported modules, and for `from` imports the names as module.name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("module", COMPILED_MODULES)
def test_compiled_module_imports_nothing_of_the_library_but_the_decorator(module: str) -> None:
    imports = imports_of(LIBRARY / module)
    assert {name for name in imports if name.startswith("ul2r")} == {
        "ul2r.objective.compiled.compiled"
    }


def test_only_the_compiled_modules_use_the_decorator() -> None:
    users = {
        path.relative_to(LIBRARY).as_posix()
        for path in LIBRARY.rglob("*.py")
        if "ul2r.objective.compiled.compiled" in imports_of(path)
    }
    assert users == set(COMPILED_MODULES)


def test_only_the_decorator_imports_numba() -> None:
    users = {
        path.relative_to(LIBRARY).as_posix()
        for path in LIBRARY.rglob("*.py")
        if any(name.split(".")[0] == "numba" for name in imports_of(path))
    }
    assert users == {"objective/compiled.py"}
