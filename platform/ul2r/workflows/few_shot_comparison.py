"""Few-shot results of the arms of a comparison, side by side and paired."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from ul2r.evaluation.few_shot.items import ITEMS_FILE, RESULT_FILE, pool_headlines, read_items
from ul2r.evaluation.few_shot.paired import PairedDifference, compare_items
from ul2r.filesystem import write_atomically
from ul2r.paths import RunPaths

FEW_SHOT_FILE = "few_shot.json"


def write_few_shot_comparison(folder: Path, arms: Mapping[str, RunPaths]) -> Path | None:
    """Write the paired differences of every two arms on every suite that both were run on; return the file, if any.

    Args:
        folder: Folder of the comparison.
        arms: Paths of what is known of each arm, base first.

    Raises:
        RecipeError: If two arms were run on other items of a task.
    """
    results = [
        (suite.name, role, form)
        for role, paths in arms.items()
        for suite in sorted(paths.few_shot.glob("*"))
        for form in sorted(suite.glob("*"))
        if (form / RESULT_FILE).is_file()
    ]
    entries = []
    for number, (suite, role, form) in enumerate(results):
        for other_suite, other_role, other_form in results[number + 1 :]:
            if suite != other_suite:
                continue
            first, second = (
                pool_headlines(read_items(path / ITEMS_FILE)) for path in (form, other_form)
            )
            entries.append(
                {
                    "suite": suite,
                    "first": f"{role} ({form.name})",
                    "second": f"{other_role} ({other_form.name})",
                    "differences": _as_plain(compare_items(first, second)),
                }
            )
    if not entries:
        return None
    path = folder / FEW_SHOT_FILE
    write_atomically(path, json.dumps(entries, indent=2) + "\n")
    return path


def _as_plain(differences: Mapping[str, PairedDifference]) -> dict[str, object]:
    return {task: asdict(difference) for task, difference in differences.items()}
