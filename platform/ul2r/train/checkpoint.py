"""Checkpoints: written beside by all ranks, renamed, then one pointer switched.

checkpoints/
  step_00000100/   Megatron-Core's distributed checkpoint, and checkpoint.json
  latest           the name of the last finished one
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing

from ul2r.config import Recipe
from ul2r.data.store import Corpus
from ul2r.errors import CheckpointError
from ul2r.model.build import sharding_metadata
from ul2r.train.step import TrainStep

FORMAT = 1


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says of itself.

    Attributes:
        run: Name of the run that wrote it.
        step: Optimizer steps taken in that run.
        tokens: Row positions seen since the first ancestor's start.
        flops: Training FLOPs since then.
        model: The recipe's `model` section.
        tokenizer: Digest of the tokenizer.
        data: Fingerprint of the token store.
        objective: The recipe's `objective` section.
        seed: The recipe's seed.
        global_batch_rows: The recipe's batch.
    """

    run: str
    step: int
    tokens: int
    flops: float
    model: dict[str, Any]
    tokenizer: str
    data: str
    objective: dict[str, Any]
    seed: int
    global_batch_rows: int

    @classmethod
    def of(
        cls, recipe: Recipe, corpus: Corpus, *, step: int, tokens: int, flops: float
    ) -> CheckpointInfo:
        """Describe a run at `step`."""
        return cls(
            run=recipe.name,
            step=step,
            tokens=tokens,
            flops=flops,
            model=recipe.model.model_dump(mode="json"),
            tokenizer=corpus.manifest.tokenizer,
            data=corpus.manifest.fingerprint,
            objective=recipe.objective.model_dump(mode="json"),
            seed=recipe.seed,
            global_batch_rows=recipe.training.global_batch_rows,
        )

    @classmethod
    def read(cls, folder: Path) -> CheckpointInfo:
        """Read a checkpoint's own description.

        Raises:
            CheckpointError: If the folder is no checkpoint of this project.
        """
        file = folder / "checkpoint.json"
        try:
            fields = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder}: not a checkpoint: checkpoint.json: {error}") from None
        found = fields.pop("format", None)
        if found != FORMAT:
            raise CheckpointError(
                f"{file}: format {found} is not {FORMAT}, which this version reads"
            )
        return cls(**fields)

    def write(self, folder: Path) -> None:
        """Write the description into the checkpoint's folder."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=2)
        (folder / "checkpoint.json").write_text(text, encoding="utf-8")

    def check_same_model(self, recipe: Recipe, corpus: Corpus) -> None:
        """Refuse to load into another model or tokenizer.

        Raises:
            CheckpointError: Naming the first field that differs and both values.
        """
        wanted = CheckpointInfo.of(recipe, corpus, step=0, tokens=0, flops=0)
        self._check(wanted, ("model", "tokenizer"))

    def check_same_run(self, recipe: Recipe, corpus: Corpus) -> None:
        """Refuse to resume with another recipe, which would make another run of it.

        Raises:
            CheckpointError: Naming the first field that differs and both values.
        """
        wanted = CheckpointInfo.of(recipe, corpus, step=0, tokens=0, flops=0)
        self._check(
            wanted, ("model", "tokenizer", "data", "objective", "seed", "global_batch_rows")
        )

    def _check(self, wanted: CheckpointInfo, fields: tuple[str, ...]) -> None:
        for field in fields:
            difference = _difference(field, getattr(self, field), getattr(wanted, field))
            if difference:
                raise CheckpointError(
                    f"checkpoint of run {self.run!r} differs from the recipe in {difference}: "
                    "give the recipe the checkpoint's value, or another name or storage"
                )


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
    """The checkpoints of one run."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

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

    def save(self, train_step: TrainStep, info: CheckpointInfo) -> None:
        """Write model and optimizer from all ranks; it counts once the pointer is switched."""
        final = self.folder / f"step_{info.step:08d}"
        writing = final.with_suffix(".writing")
        first = dist.get_rank() == 0
        if first:
            for leftover in self.folder.glob("*.writing"):
                shutil.rmtree(leftover)
            writing.mkdir(parents=True)
        dist.barrier()
        dist_checkpointing.save(_sharded_state(train_step), str(writing))
        dist.barrier()
        if first:
            info.write(writing)
            self._switch(writing, final)
        dist.barrier()

    def _switch(self, writing: Path, final: Path) -> None:
        if final.exists():  # finished, but its pointer was not switched before the run was killed
            shutil.rmtree(final)
        writing.rename(final)
        pointer = self.folder / "latest.writing_pointer"
        pointer.write_text(final.name, encoding="utf-8")
        pointer.replace(self.folder / "latest")
        for old in sorted(self.folder.glob("step_" + "[0-9]" * 8))[: -self.keep]:
            shutil.rmtree(old)


def base_checkpoint(recipe: Recipe) -> Path | None:
    """The checkpoint that a run starts from, None if it starts from initial weights.

    Raises:
        CheckpointError: If the recipe names a base that has no checkpoint.
    """
    if recipe.base is None:
        return None
    folder = recipe.run_folder(recipe.base) / "checkpoints"
    path = CheckpointStore(folder, keep=1).latest()
    if path is None:
        raise CheckpointError(
            f"base={recipe.base} has no checkpoint in {folder}: train it first with jobs/train.py"
        )
    return path


def load_checkpoint(folder: Path, train_step: TrainStep, *, optimizer: bool) -> None:
    """Load weights, and optimizer state if asked, saved under any layout into this one."""
    state = _sharded_state(train_step, loading=True, optimizer=optimizer)
    loaded = dist_checkpointing.load(state, str(folder))
    train_step.unwrapped.load_state_dict(loaded["model"])
    if optimizer:
        train_step.optimizer.load_state_dict(loaded["optimizer"])
    else:
        train_step.optimizer.reload_model_params()


def _sharded_state(
    train_step: TrainStep, *, loading: bool = False, optimizer: bool = True
) -> dict[str, Any]:
    metadata = sharding_metadata()
    model = train_step.unwrapped.sharded_state_dict(metadata=metadata)
    if not optimizer:
        return {"model": model}
    state = train_step.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)
    return {"model": model, "optimizer": state}
