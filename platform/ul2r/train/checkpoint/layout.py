"""Names of files in a run's checkpoint folder, on disk and in its remote copy.

checkpoints/
  step_00000100/     Megatron-Core's distributed checkpoint
    checkpoint.json  its description (metadata.py)
    digests.json     sizes and SHA-256 of all files, written last (checksums.py)
  latest             name of the last finished checkpoint
  owner              token of the attempt at the run that may write here (storage.py, remote.py)
"""

from __future__ import annotations

import re
from collections.abc import Iterable

INFO_FILE = "checkpoint.json"
DIGESTS_FILE = "digests.json"
LATEST_FILE = "latest"
WRITER_TOKEN_FILE = "owner"

# No further leading zeros: a step has one name.
_CHECKPOINT_NAME = re.compile(r"step_(\d{8}|[1-9]\d{8,})")


def checkpoint_name(step: int) -> str:
    """Return the folder name of the checkpoint of a step."""
    return f"step_{step:08d}"


def lineage_of(writer_token: str) -> str:
    """Return the part of a token that all attempts at a run in one storage have in common."""
    return writer_token.partition(".")[0]


def parse_step(name: str) -> int | None:
    """Return the step of a checkpoint's folder name, None for any other name."""
    match = _CHECKPOINT_NAME.fullmatch(name)
    return int(match[1]) if match else None


def list_up_to(pointer: str, names: Iterable[str]) -> list[str]:
    """Return the names of the checkpoints up to the one that a pointer names, newest first.

    Args:
        pointer: Content of `latest`. If it names no checkpoint it is damaged, and no checkpoint is excluded. The
            checkpoint that it names is returned even if it is not among `names`, so that its loss is noticed.
        names: Files and folders next to the pointer.
    """
    last = parse_step(pointer.strip())
    steps = {step for name in names if (step := parse_step(name)) is not None}
    if last is not None:
        steps = {step for step in steps if step <= last} | {last}
    return [checkpoint_name(step) for step in sorted(steps, reverse=True)]
