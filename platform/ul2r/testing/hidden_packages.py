"""Processes that do not find packages which are installed."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

SITE = """\
import importlib.machinery
import sys

HIDDEN = {names}


class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            return None
        return super().find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Finder
"""
"""Code that Python runs when it starts, in a module of the name that it looks for."""


def hide_packages(folder: Path, names: Collection[str], python_path: str) -> dict[str, str]:
    """Return the environment of processes, and of those that they start, in which packages are not installed.

    Args:
        folder: An empty folder.
        names: Packages.
        python_path: PYTHONPATH of the processes.
    """
    (folder / "sitecustomize.py").write_text(SITE.format(names=set(names)), encoding="utf-8")
    return {"PYTHONPATH": f"{folder}{os.pathsep}{python_path}"}
