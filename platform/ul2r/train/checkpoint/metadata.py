"""What a checkpoint says of itself, and which runs may go on from it."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from ul2r.config import Architecture, Recipe
from ul2r.config.recipe import Change
from ul2r.data.store.dataset import TokenDataset
from ul2r.errors import CheckpointError

INFO = "checkpoint.json"
FORMAT = 1
RECIPE_PARTS: dict[str, Any] = {
    "base": True,
    "model": True,
    "objective": True,
    "optimizer": True,
    "seed": True,
    "training": {"steps", "global_batch_size"},
}
"""What a run cannot change when it goes on; layout, logging and launch may."""


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says of itself.

    Attributes:
        identity: Of this very checkpoint; no other has it.
        run: Name of the run that wrote it.
        step: Optimizer steps taken in that run.
        tokens: Row positions seen since the first ancestor's start.
        flops: Training FLOPs since then.
        base: Identity of the checkpoint that the run started from, None for initial weights.
        tokenizer: Digest of the tokenizer.
        data: Fingerprint of the token store.
        recipe: The parts of the recipe that make the run what it is.
        guards: What `ul2r.train.monitor.guards` remembers: batches skipped, and the last steps' losses.
    """

    identity: str
    run: str
    step: int
    tokens: int
    flops: float
    base: str | None
    tokenizer: str
    data: str
    recipe: dict[str, Any]
    guards: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        dataset: TokenDataset,
        *,
        step: int = 0,
        tokens: int = 0,
        flops: float = 0.0,
        base: str | None = None,
        guards: dict[str, Any] | None = None,
    ) -> CheckpointInfo:
        """Describe a run at `step`."""
        return cls(
            identity=uuid.uuid4().hex,
            run=recipe.name,
            step=step,
            tokens=tokens,
            flops=flops,
            base=base,
            tokenizer=dataset.manifest.tokenizer,
            data=dataset.manifest.fingerprint,
            recipe=recipe.model_dump(mode="json", include=RECIPE_PARTS),
            guards=guards or {},
        )

    @property
    def finished(self) -> bool:
        """Whether the run has taken all its steps."""
        return self.step >= self.planned_steps

    @property
    def planned_steps(self) -> int:
        """Steps of the whole run."""
        return int(self.recipe["training"]["steps"])

    @classmethod
    def read(cls, folder: Path) -> CheckpointInfo:
        """Read a checkpoint's own description.

        Raises:
            CheckpointError: If the folder is no checkpoint of this project.
        """
        file = folder / INFO
        try:
            fields = dict(json.loads(file.read_text(encoding="utf-8")))
            found = fields.pop("format", None)
            if found == FORMAT:
                return cls(**fields)
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{folder}: not a checkpoint: {INFO}: {error}") from None
        raise CheckpointError(f"{file}: format {found} is not {FORMAT}, which this version reads")

    def write(self, folder: Path) -> None:
        """Write the description into the checkpoint's folder."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=2)
        (folder / INFO).write_text(text, encoding="utf-8")

    def check_same_model(self, recipe: Recipe, dataset: TokenDataset) -> None:
        """Refuse to load into another model or tokenizer.

        Raises:
            CheckpointError: Naming the first field that differs and both values.
        """
        wanted = CheckpointInfo.of(recipe, dataset)
        self._check(
            {
                "model": (_described(self.recipe["model"]), _described(wanted.recipe["model"])),
                "tokenizer": (self.tokenizer, wanted.tokenizer),
            }
        )

    def check_same_run(self, recipe: Recipe, dataset: TokenDataset) -> None:
        """Refuse to resume with another recipe, which would make another run of it.

        Raises:
            CheckpointError: Naming the first field that differs and both values.
        """
        wanted = CheckpointInfo.of(recipe, dataset)
        fields = {
            "tokenizer": (self.tokenizer, wanted.tokenizer),
            "data": (self.data, wanted.data),
            **{part: (self.recipe[part], wanted.recipe[part]) for part in sorted(RECIPE_PARTS)},
            "model": (_described(self.recipe["model"]), _described(wanted.recipe["model"])),
        }
        accepted = recipe.checkpoints.accept_changes
        self._check({name: both for name, both in fields.items() if name not in accepted})

    def _check(self, fields: Mapping[str, tuple[object, object]]) -> None:
        for name, (saved, wanted) in fields.items():
            difference = _difference(name, saved, wanted)
            if difference:
                accept = f", --set checkpoints.accept_changes=[{name}]"
                raise CheckpointError(
                    f"checkpoint of run {self.run!r} differs from the recipe in {difference}: give the recipe the "
                    f"checkpoint's value{accept if name in get_args(Change) else ''}, or another name or storage"
                )


def _described(model: dict[str, Any]) -> dict[str, Any]:
    """A model's settings, with the defaults of those that came to be after its checkpoint."""
    return Architecture.model_validate(model).model_dump(mode="json")


def _difference(path: str, saved: object, wanted: object) -> str | None:
    """The first differing leaf as "a.b: 4 in the checkpoint, 8 in the recipe"."""
    if isinstance(saved, dict) and isinstance(wanted, dict):
        for key in (*wanted, *(key for key in saved if key not in wanted)):
            found = _difference(f"{path}.{key}", saved.get(key), wanted.get(key))
            if found:
                return found
        return None
    return None if saved == wanted else f"{path}: {saved} in the checkpoint, {wanted} in the recipe"
