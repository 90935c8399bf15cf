"""Field types that several sections of a recipe share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field


def resolve_path(path: Path) -> Path:
    """Return an absolute path with `~` expanded, so that it means the same in every worker's working directory."""
    return path.expanduser().absolute()


def resolve_folder_or_url(location: str) -> str:
    """Return a folder as an absolute path, and a URL unchanged."""
    # A path would make "s3://bucket" into "s3:/bucket".
    return location if "://" in location else str(resolve_path(Path(location)))


PositiveInt = Annotated[int, Field(gt=0)]
AbsolutePath = Annotated[Path, AfterValidator(resolve_path)]
FolderOrUrl = Annotated[str, AfterValidator(resolve_folder_or_url)]
"""A local folder, or a URL that fsspec knows (s3://, gs://, https://)."""

# A run's name is also the name of its folder.
RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
RunName = Annotated[str, Field(pattern=RUN_NAME, max_length=250)]
