"""Description of a checkpoint, and the checks on which runs may resume or start from it."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from ul2r.config import Architecture, Change, Objective, Recipe
from ul2r.config.optimizer import Optimizer
from ul2r.config.renamed_keys import rename_keys
from ul2r.config.strict_model import StrictModel
from ul2r.data.store.dataset import TokenDataset, run_fingerprint
from ul2r.errors import CheckpointError
from ul2r.train.checkpoint.layout import INFO_FILE
from ul2r.train.checkpoint.prolonging import find_obstacle, without_schedule

FORMAT = 3
"""Format 2 had no `data`, format 1 other names of fields and of recipe keys; both are still read."""
_FORMAT_1_FIELDS = {
    "identity": "checkpoint_id",
    "run": "run_name",
    "base": "base_id",
    "tokenizer": "tokenizer_digest",
    "data": "data_fingerprint",
}
RECIPE_PARTS: dict[str, Any] = {
    "base": True,
    "model": True,
    "objective": True,
    "optimizer": True,
    "seed": True,
    "training": {"steps", "global_batch_size"},
}
"""Parts of the recipe that stay the same over a run; layout, logging and launch may change on resume."""
SECTIONS: dict[str, type[StrictModel]] = {
    "model": Architecture,
    "objective": Objective,
    "optimizer": Optimizer,
}
"""Parts that are compared setting by setting: a checkpoint lacks the settings that are newer than it."""


@dataclass(frozen=True)
class CheckpointInfo:
    """Description of a checkpoint, kept in its folder.

    Attributes:
        checkpoint_id: Random identifier of this very checkpoint.
        run_name: Run that wrote it.
        step: Optimizer steps taken in that run.
        tokens: Row positions seen since the first ancestor's start.
        flops: Training FLOPs since then.
        base_id: `checkpoint_id` of the checkpoint that the run started from, None for initial weights.
        tokenizer_digest: Digest of the tokenizer.
        data_fingerprint: Fingerprint of the token store, or of it and the pairs that the run is trained on.
        recipe: The parts of the recipe that make the run what it is.
        guards: State of `ul2r.train.monitor.guards`: batches skipped, and the losses of the last steps.
        data: The order in which the run reads its text, and what its weights were trained on before (`lineage.py`);
            None for a run of a version without it, whose order is that of its seed.
    """

    checkpoint_id: str
    run_name: str
    step: int
    tokens: int
    flops: float
    base_id: str | None
    tokenizer_digest: str
    data_fingerprint: str
    recipe: dict[str, Any]
    guards: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] | None = None

    @classmethod
    def from_recipe(
        cls,
        recipe: Recipe,
        dataset: TokenDataset,
        *,
        step: int = 0,
        tokens: int = 0,
        flops: float = 0.0,
        base_id: str | None = None,
        guards: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
    ) -> CheckpointInfo:
        """Describe a run at `step`, under a new identifier."""
        return cls(
            checkpoint_id=uuid.uuid4().hex,
            run_name=recipe.name,
            step=step,
            tokens=tokens,
            flops=flops,
            base_id=base_id,
            tokenizer_digest=dataset.manifest.tokenizer,
            data_fingerprint=run_fingerprint(recipe, dataset),
            # As JSON, so that it compares equal to one read back: no tuples, no paths.
            recipe=recipe.model_dump(mode="json", include=RECIPE_PARTS),
            guards=guards or {},
            data=data,
        )

    @property
    def is_finished(self) -> bool:
        """True if the run has taken all its steps."""
        return self.step >= self.num_steps

    @property
    def num_steps(self) -> int:
        """Steps of the whole run."""
        return int(self.recipe["training"]["steps"])

    @classmethod
    def read(cls, folder: Path) -> CheckpointInfo:
        """Read the description of a checkpoint.

        Raises:
            CheckpointError: If the folder is not a checkpoint of this project.
        """
        file = folder / INFO_FILE
        try:
            fields = dict(json.loads(file.read_text(encoding="utf-8")))
            found = int(fields.pop("format"))
            if found == 1:
                fields = _upgrade_format_1(fields)
            # A newer format is refused below, after the `except`, whose message would call it no checkpoint.
            if found <= FORMAT:
                return cls(**fields)
        except (OSError, ValueError, TypeError, KeyError) as error:
            # TypeError and KeyError: valid JSON that lacks fields, or has others.
            reason = str(error) or type(error).__name__
            raise CheckpointError(f"{folder}: not a checkpoint: {INFO_FILE}: {reason}") from None

        raise CheckpointError(
            f"{file}: format {found} is newer than this version, which reads formats 1 to {FORMAT}: update ul2r"
        )

    def write(self, folder: Path) -> None:
        """Write the description into the checkpoint's folder."""
        content = {"format": FORMAT, **asdict(self)}
        (folder / INFO_FILE).write_text(json.dumps(content, indent=2), encoding="utf-8")

    def check_same_model(self, recipe: Recipe, dataset: TokenDataset) -> None:
        """Refuse to load the weights into another model or tokenizer.

        Raises:
            CheckpointError: If they differ; it names the first field that does and both values.
        """
        wanted = CheckpointInfo.from_recipe(recipe, dataset)
        self._check(
            {
                "model": self._settings("model", wanted),
                "tokenizer": (self.tokenizer_digest, wanted.tokenizer_digest),
            }
        )

    def check_same_run(self, recipe: Recipe, dataset: TokenDataset) -> None:
        """Refuse to resume with a recipe that describes another run; one with more steps may prolong it.

        Raises:
            CheckpointError: If they differ; it names the first field that does and both values.
        """
        wanted = CheckpointInfo.from_recipe(recipe, dataset)
        fields: dict[str, tuple[object, object]] = {
            "tokenizer": (self.tokenizer_digest, wanted.tokenizer_digest),
            "data": (self.data_fingerprint, wanted.data_fingerprint),
            **{part: self._settings(part, wanted) for part in sorted(RECIPE_PARTS)},
            # Not a part of the recipe: a checkpoint from before this setting has the default.
            "data.continue_from_base": (
                bool(self.data and self.data["order"]["continues_base"]),
                recipe.data.continue_from_base,
            ),
        }
        if wanted.num_steps > self.num_steps:
            self._allow_more_steps(fields, wanted)

        # Never that of the model, whose weights have to fit: `Change` has no such value.
        accepted = recipe.checkpoints.accept_changes
        self._check({name: values for name, values in fields.items() if name not in accepted})

    def _allow_more_steps(
        self, fields: dict[str, tuple[object, object]], wanted: CheckpointInfo
    ) -> None:
        """Leave out of a comparison what may differ in a run that is prolonged.

        Raises:
            CheckpointError: If the run cannot be prolonged.
        """
        saved, new = fields["optimizer"]
        assert isinstance(saved, dict)
        assert isinstance(new, dict)
        fields["optimizer"] = without_schedule(saved), without_schedule(new)
        # First: under another schedule, whether the steps can be raised does not matter.
        self._check({"optimizer": fields["optimizer"]})

        obstacle = find_obstacle(
            Optimizer.model_validate(saved),
            self.num_steps,
            Optimizer.model_validate(new),
            wanted.num_steps,
            self.step,
        )
        if obstacle is not None:
            raise CheckpointError(
                f"checkpoint of run {self.run_name!r} is of a run of {self.num_steps} steps, which cannot be prolonged "
                f"to training.steps={wanted.num_steps}: {obstacle}; or continue its weights in a run with another name "
                f"and base: {self.run_name}"
            )
        training = dict(self.recipe["training"])
        fields["training"] = training | {"steps": wanted.num_steps}, wanted.recipe["training"]

    def _settings(self, part: str, wanted: CheckpointInfo) -> tuple[object, object]:
        """Return a part of both recipes, with defaults for settings that are newer than the checkpoint."""
        saved, new = self.recipe[part], wanted.recipe[part]
        if part == "base":
            # A run that has a checkpoint does not read its base again, and the Hub's branch may have moved on.
            saved, new = _without_revision(saved), _without_revision(new)
        if part in SECTIONS:
            saved, new = (
                SECTIONS[part].model_validate(settings).model_dump(mode="json")
                for settings in (saved, new)
            )
        return saved, new

    def _check(self, fields: Mapping[str, tuple[object, object]]) -> None:
        for name, (saved, wanted) in fields.items():
            difference = _find_difference(name, saved, wanted)
            if difference is None:
                continue
            accept = f", --set checkpoints.accept_changes=[{name}]"
            raise CheckpointError(
                f"checkpoint of run {self.run_name!r} differs from the recipe in {difference}: set the recipe to the "
                f"checkpoint's value{accept if name in get_args(Change) else ''}, or choose another name or storage"
            )


def _upgrade_format_1(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a format 1 description under their current names."""
    renamed = {_FORMAT_1_FIELDS.get(name, name): value for name, value in fields.items()}
    return {**renamed, "recipe": rename_keys(renamed["recipe"])}


def _without_revision(base: object) -> object:
    return {**base, "revision": None} if isinstance(base, dict) and "hf" in base else base


def _find_difference(path: str, saved: object, wanted: object) -> str | None:
    """Return the first leaf that differs, as "a.b: 4 in the checkpoint, 8 in the recipe"."""
    if isinstance(saved, dict) and isinstance(wanted, dict):
        # A key that one side lacks counts as None: an optional setting that is newer than the checkpoint differs only
        # if it is used.
        for key in (*wanted, *(key for key in saved if key not in wanted)):
            found = _find_difference(f"{path}.{key}", saved.get(key), wanted.get(key))
            if found:
                return found
        return None
    return None if saved == wanted else f"{path}: {saved} in the checkpoint, {wanted} in the recipe"
