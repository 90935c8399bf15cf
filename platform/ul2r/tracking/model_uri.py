"""Names of models in MLflow's registry: models:/NAME@ALIAS, models:/NAME/3, models:/NAME/latest."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from ul2r.errors import CheckpointError

PATTERN = re.compile(
    r"models:/(?P<name>[^/@]+)(@(?P<alias>[^/@]+)|/(?P<version>\d+|latest))?", re.I
)
FORMS = "models:/NAME@ALIAS, models:/NAME/VERSION or, for the newest version, models:/NAME/latest"


@dataclass(frozen=True)
class ModelUri:
    """A version of a registered model: by alias, by number, or the newest one.

    Attributes:
        name: The registered model.
        alias: Its alias, None without one.
        version: Its number; None without one.
    """

    name: str
    alias: str | None = None
    version: int | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse a URI; without alias and version, or with the version "latest", it names the newest version.

        Raises:
            CheckpointError: If it has another form.
        """
        match = PATTERN.fullmatch(text)
        if match is None:
            raise CheckpointError(
                f"{text!r} is not a registry URI: write {FORMS}, for example models:/ul2r-demo@champion"
            )
        version = match["version"]
        return cls(
            match["name"],
            match["alias"],
            int(version) if version is not None and version.isdigit() else None,
        )

    def __str__(self) -> str:
        if self.alias is not None:
            return f"models:/{self.name}@{self.alias}"
        return f"models:/{self.name}/{'latest' if self.version is None else self.version}"


def is_model_uri(model: str) -> bool:
    """Return whether `model` is a URI in a model registry rather than a folder."""
    return model.startswith("models:")
