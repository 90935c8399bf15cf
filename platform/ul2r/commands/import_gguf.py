"""Convert a GGUF file to a Hugging Face folder, which can be the base of a run.

    ul2r import-gguf FILE FOLDER

FILE is llama.cpp's: of a Llama (SmolLM and Mistral 7B are of that kind), Qwen 2, 2.5 or 3, or Gemma 3. FOLDER is
made. Quantized weights are written as the float32 numbers that they stand for: about 6 times as large as a file of
4 bits.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from ul2r.workflows.cli import run_and_report


def main(arguments: Sequence[str] | None = None, program: str | None = None) -> int:
    """Run the command line `arguments`, by default the process's; return the exit code."""
    parser = argparse.ArgumentParser(
        # The docstring keeps its line breaks in --help.
        prog=program,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="GGUF file of a whole model")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="folder to be made")
    options = parser.parse_args(arguments)
    return run_and_report(lambda: run(options.file, options.folder))


def run(file: Path, folder: Path) -> None:
    """Convert the file, then print what it is and the line that a recipe needs."""
    from ul2r.model.huggingface.gguf_import import import_gguf

    print(import_gguf(file, folder))
    print(f"\nbase:\n  hf: {json.dumps(str(folder))}")
