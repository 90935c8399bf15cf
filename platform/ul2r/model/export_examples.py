r"""Examples of an export: prompts that its model answers well, in examples.json.

[{"left": "def area(width,", "right": "):\n    return width * height\n", "answer": " height"}]
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ul2r.errors import CheckpointError
from ul2r.filesystem import write_atomically
from ul2r.model.export_metadata import PARSING_ERRORS

EXAMPLES_FILE = "examples.json"


@dataclass(frozen=True)
class Example:
    """A text and what the model writes in it.

    Attributes:
        left: Text before the answer.
        right: Text after it; empty if the answer continues the text.
        answer: Written greedily.
    """

    left: str
    right: str
    answer: str


def write_examples(folder: Path, examples: Sequence[Example]) -> None:
    """Write the examples into an export's folder, unless it has them."""
    tree = [asdict(example) for example in examples]
    text = json.dumps(tree, indent=2, ensure_ascii=False) + "\n"
    file = folder / EXAMPLES_FILE
    if not (file.is_file() and file.read_text("utf-8") == text):
        write_atomically(file, text)


def read_examples(folder: Path) -> tuple[Example, ...]:
    """Return an export's examples; none if it has no such file, as one that was never measured.

    Raises:
        CheckpointError: If the file is damaged.
    """
    file = folder / EXAMPLES_FILE
    if not file.is_file():
        return ()
    try:
        examples = tuple(Example(**fields) for fields in json.loads(file.read_text("utf-8")))
        if not all(isinstance(v, str) for example in examples for v in vars(example).values()):
            raise TypeError("a value is no text")
    except PARSING_ERRORS as error:
        raise CheckpointError(
            f"{file} cannot be read ({type(error).__name__}: {error}): remove it, the model is served without"
        ) from error
    return examples
