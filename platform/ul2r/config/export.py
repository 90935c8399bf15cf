"""The exported model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from ul2r.config.strict_model import StrictModel

# Of huggingface_hub: an owner or none, and no "..", "--" or ".git" at the end, which it refuses itself.
HUB_NAME = r"^([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9_][\w.-]*$"

# MLflow refuses `/` and `:`, searches by the name in quotes, and a served model is named models:/NAME@ALIAS.
REGISTERED_MODEL = r"""^[^\s/:@'"`%]([^/:@'"`%\r\n]*[^\s/:@'"`%])?$"""


def _check_alias(alias: str) -> str:
    # MLflow's own rule: `latest` and v1, v2, ... already name versions.
    if not re.fullmatch(r"[\w-]+", alias) or re.fullmatch(r"latest|v\d+", alias, re.IGNORECASE):
        raise ValueError(
            f"alias {alias!r}: use letters, digits, _ and -, and not latest or v1, v2, ..., which name versions"
        )
    return alias


class Export(StrictModel):
    """Export, registration and publication of a finished run."""

    registered_model: Annotated[str, Field(pattern=REGISTERED_MODEL, max_length=250)] | None = None
    """Name in MLflow's registry; by default the model is not registered."""
    alias: Annotated[str, Field(max_length=250), AfterValidator(_check_alias)] = "champion"
    push_to_hub: Annotated[str, Field(pattern=HUB_NAME, max_length=96)] | None = None
    """Name on the Hugging Face Hub (NAME or OWNER/NAME) to upload the export to; by default it is not uploaded."""
    hub_private: bool = True
    """Visibility of a repository that `push_to_hub` creates."""
    max_shard_gib: float = Field(default=4, gt=0)
    """Largest file of weights; writing one takes about as much memory."""
    checkpoint: Path | None = None
    """Checkpoint to export instead of the run's last one: an earlier one, or one that Megatron-LM wrote
    (`torch_dist`)."""
