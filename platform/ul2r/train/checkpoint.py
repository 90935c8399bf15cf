"""The checkpoints of a run on disk: written beside, renamed, then one pointer switched.

checkpoints/
  step_00000100/   Megatron-Core's distributed checkpoint, and checkpoint.json
  latest           the name of the last finished one
  owner            the attempt at the run that may write

Nothing here needs torch or Megatron-Core, so that a driver looks at checkpoints without waiting for their import.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ul2r.config import Architecture, Recipe
from ul2r.data.prepared import Corpus
from ul2r.errors import CheckpointError

FORMAT = 1
RECIPE_PARTS: dict[str, Any] = {
    "base": True,
    "model": True,
    "objective": True,
    "optimizer": True,
    "seed": True,
    "training": {"steps", "global_batch_rows"},
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

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        corpus: Corpus,
        *,
        step: int = 0,
        tokens: int = 0,
        flops: float = 0.0,
        base: str | None = None,
    ) -> CheckpointInfo:
        """Describe a run at `step`."""
        return cls(
            identity=uuid.uuid4().hex,
            run=recipe.name,
            step=step,
            tokens=tokens,
            flops=flops,
            base=base,
            tokenizer=corpus.manifest.tokenizer,
            data=corpus.manifest.fingerprint,
            recipe=recipe.model_dump(mode="json", include=RECIPE_PARTS),
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
        file = folder / "checkpoint.json"
        try:
            fields = dict(json.loads(file.read_text(encoding="utf-8")))
            found = fields.pop("format", None)
            if found == FORMAT:
                return cls(**fields)
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{folder}: not a checkpoint: checkpoint.json: {error}") from None
        raise CheckpointError(f"{file}: format {found} is not {FORMAT}, which this version reads")

    def write(self, folder: Path) -> None:
        """Write the description into the checkpoint's folder."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=2)
        (folder / "checkpoint.json").write_text(text, encoding="utf-8")

    def check_same_model(self, recipe: Recipe, corpus: Corpus) -> None:
        """Refuse to load into another model or tokenizer.

        Raises:
            CheckpointError: Naming the first field that differs and both values.
        """
        wanted = CheckpointInfo.of(recipe, corpus)
        self._check(
            ("model", _described(self.recipe["model"]), _described(wanted.recipe["model"])),
            ("tokenizer", self.tokenizer, wanted.tokenizer),
        )

    def check_same_run(self, recipe: Recipe, corpus: Corpus) -> None:
        """Refuse to resume with another recipe, which would make another run of it.

        Raises:
            CheckpointError: Naming the first field that differs and both values.
        """
        self.check_same_model(recipe, corpus)
        wanted = CheckpointInfo.of(recipe, corpus)
        self._check(
            ("data", self.data, wanted.data),
            *(
                (part, self.recipe[part], wanted.recipe[part])
                for part in sorted(RECIPE_PARTS)
                if part != "model"
            ),
        )

    def _check(self, *fields: tuple[str, object, object]) -> None:
        for name, saved, wanted in fields:
            difference = _difference(name, saved, wanted)
            if difference:
                raise CheckpointError(
                    f"checkpoint of run {self.run!r} differs from the recipe in {difference}: "
                    "give the recipe the checkpoint's value, or another name or storage"
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


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: The run's `checkpoints`.
        keep: Finished checkpoints that stay.
        owner: The attempt that writes, from `claim`; a store without one only reads.
    """

    def __init__(self, folder: Path, keep: int = 1, owner: str | None = None) -> None:
        self.folder, self.keep, self.owner = folder, keep, owner

    def latest(self) -> Path | None:
        """Folder of the last finished checkpoint, None before the first.

        Raises:
            CheckpointError: If the pointer names a checkpoint that is not there.
        """
        pointer = self.folder / "latest"
        if not pointer.exists():
            return None
        path = self.folder / pointer.read_text(encoding="utf-8").strip()
        if not path.is_dir():
            raise CheckpointError(f"{pointer} names {path.name}, which is not there: restore it")
        return path

    def begin(self) -> None:
        """Remove what a killed attempt left unfinished, before the first save; rank 0 calls it.

        Raises:
            CheckpointError: If another attempt at the run has begun since this one did.
        """
        self._check_owner()
        for leftover in self.folder.glob("*.writing"):
            shutil.rmtree(leftover)

    def beside(self, step: int) -> Path:
        """Where the checkpoint of a step is written until it is finished."""
        return self._final(step).with_suffix(".writing")

    def finish(self, step: int) -> None:
        """Make the wholly written folder of a step the last checkpoint, then remove older ones beyond `keep`.

        Those of later steps go too: left by an attempt that was killed before it switched the pointer, or
        undone by a pointer that was set back.

        Raises:
            CheckpointError: If another attempt at the run has begun since this one did.
        """
        self._check_owner()
        final, writing = self._final(step), self.beside(step)
        if final.exists():
            shutil.rmtree(final)
        writing.rename(final)
        _replace_text(self.folder / "latest", final.name)
        finished = sorted(self.folder.glob("step_" + "[0-9]" * 8))
        kept = [path for path in finished if path <= final][-self.keep :]
        for path in finished:
            if path not in kept:
                shutil.rmtree(path)

    def _final(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def _check_owner(self) -> None:
        if (self.folder / "owner").read_text(encoding="utf-8") != self.owner:
            raise CheckpointError(
                f"another attempt at this run writes to {self.folder}: let it go on, or stop it first"
            )


def claim(folder: Path) -> str:
    """Begin an attempt at a run: from now on only it may write checkpoints to `folder`.

    An earlier attempt that still lives, such as workers whose driver was killed, fails at its next checkpoint.

    Returns:
        The attempt's name, the `owner` of its `CheckpointStore`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    owner = uuid.uuid4().hex
    _replace_text(folder / "owner", owner)
    return owner


def _replace_text(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def base_checkpoint(recipe: Recipe) -> Path | None:
    """The checkpoint that a run starts from, None if it starts from initial weights or from a foreign base.

    Raises:
        CheckpointError: If the recipe names a base that has no checkpoint, or is not finished.
    """
    if not isinstance(recipe.base, str):
        return None
    folder = recipe.run_folder(recipe.base) / "checkpoints"
    path = CheckpointStore(folder).latest()
    if path is None:
        raise CheckpointError(
            f"base={recipe.base} has no checkpoint in {folder}: train it first with jobs/train.py"
        )
    info = CheckpointInfo.read(path)
    if not info.finished:
        raise CheckpointError(
            f"base={recipe.base} stands at step {info.step} of {info.planned_steps}: "
            "finish it first with jobs/train.py"
        )
    return path
