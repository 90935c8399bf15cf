"""Print the results of `benchmarks/device.sh` as Markdown: its steps, then every figure.

    python benchmarks/device/table.py FOLDER

FOLDER holds steps.tsv (name, exit code, seconds, last line) and results.jsonl (the benchmarks' lines).
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

EXIT_CODE_OF_TIMEOUT = {"124": "reached its limit", "137": "was killed at its limit"}


def flatten(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:  # noqa: ANN401  a JSON value
    """Yield the leaves of a JSON object with the path to each."""
    if isinstance(value, dict):
        for key, member in value.items():
            yield from flatten(member, (*path, key))
    else:
        yield " ".join(path), value


def print_steps(folder: Path) -> None:
    """Print a row for each step."""
    print("| step | result | seconds | last line |\n|---|---|---|---|")
    with (folder / "steps.tsv").open(newline="") as file:
        for name, code, seconds, last_line in csv.reader(
            file, delimiter="\t", quoting=csv.QUOTE_NONE
        ):
            result = "ok" if code == "0" else EXIT_CODE_OF_TIMEOUT.get(code, f"exit code {code}")
            if code == "-":
                result = "not run"
            print(f"| {name} | {result} | {seconds} | {last_line.replace('|', '/')} |")


def print_figures(folder: Path) -> None:
    """Print a row for each figure of each benchmark."""
    print("\n| benchmark | figure | value |\n|---|---|---|")
    for line in (folder / "results.jsonl").read_text().splitlines():
        result = json.loads(line)
        benchmark = result.pop("benchmark")
        for figure, value in flatten(result):
            print(f"| {benchmark} | {figure} | {value} |")


if __name__ == "__main__":
    print_steps(Path(sys.argv[1]))
    print_figures(Path(sys.argv[1]))
