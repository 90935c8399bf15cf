"""The checkpoints of a run on disk: written beside, renamed, then one pointer switched.

checkpoints/
  step_00000100/   Megatron-Core's distributed checkpoint, checkpoint.json, and digests.json of all files
  latest           the name of the last finished one
  owner            the attempt at the run that may write

Nothing here needs torch or Megatron-Core, so that a driver looks at checkpoints without waiting for their import.
"""

from __future__ import annotations

import logging
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from ul2r.config import Recipe
from ul2r.errors import CheckpointError
from ul2r.filesystem import file_lock
from ul2r.train.checkpoint.checksums import find_damage
from ul2r.train.checkpoint.metadata import CheckpointInfo
from ul2r.train.checkpoint.remote import Mirror
from ul2r.train.checkpoint.retention import Retention, finished_up_to, name_of, step_of

logger = logging.getLogger(__name__)


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: The run's `checkpoints`.
        retention: Which finished checkpoints stay.
        owner: The attempt that writes, from `acquire_writer_token`; a store without one only reads.
        mirror: Where copies of them are.
    """

    def __init__(
        self,
        folder: Path,
        retention: Retention | None = None,
        owner: str | None = None,
        mirror: Mirror | None = None,
    ) -> None:
        self.folder, self.owner, self.mirror = folder, owner, mirror
        self.retention = retention or Retention()
        self._resumed, self._written = 0, set[int]()

    @classmethod
    def from_recipe(
        cls, recipe: Recipe, run: str | None = None, owner: str | None = None
    ) -> CheckpointStore:
        """The checkpoints of a recipe's run, or of another one in the same storage."""
        settings, name = recipe.checkpoints, run or recipe.name
        return cls(
            recipe.storage_paths.run(name).checkpoints,
            Retention(settings.keep, settings.keep_every),
            owner,
            Mirror(settings.remote_dir, name) if settings.remote_dir else None,
        )

    def candidates(self) -> list[Path]:
        """Finished checkpoints up to the last one, newest first, whether sound or not."""
        try:
            pointer = (self.folder / "latest").read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return []
        names = (path.name for path in self.folder.iterdir() if path.is_dir())
        return [self.folder / name for name in finished_up_to(pointer, names)]

    def restore(self) -> Path | None:
        """Fetch the last checkpoint from the mirror, None if there is none.

        Raises:
            CheckpointError: If the mirror fails, or none of its copies is whole.
        """
        if self.mirror is None or not self.mirror.holds_any():
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        with file_lock(self.folder / ".restoring"):
            for path in self.candidates():
                if find_damage(path) is None:
                    return path  # restored by another process while this one waited
            fetched = self.mirror.fetch(self.folder)
            _replace_text(self.folder / "latest", fetched.name)
            logger.info("%s: %s was fetched from %s", self.folder, fetched.name, self.mirror.url)
        return fetched

    def begin(self, resumed: int = 0) -> None:
        """Remove what a killed attempt left unfinished, before the first save; rank 0 calls it.

        Args:
            resumed: The step that this attempt goes on from. Checkpoints of later steps, which are damaged or were
                undone, go with the first one that is finished.

        Raises:
            CheckpointError: If another attempt at the run has begun since this one did.
        """
        self._check_owner()
        self._resumed = resumed
        for leftover in self.folder.glob("*.writing"):
            shutil.rmtree(leftover)

    def open(self, step: int) -> None:
        """Make the folder `beside` of a step.

        Raises:
            CheckpointError: If another attempt at the run has begun since this one did.
        """
        self._check_owner()
        self.beside(step).mkdir()

    def abandon(self, step: int) -> None:
        """Remove what was written of a step's checkpoint."""
        shutil.rmtree(self.beside(step))

    def beside(self, step: int) -> Path:
        """Where the checkpoint of a step is written until it is finished; each attempt has a place of its own."""
        return self.folder / f"{name_of(step)}.{self.owner}.writing"

    def finish(self, step: int) -> Path:
        """Make the wholly written folder of a step the last checkpoint, then remove those that are kept no longer.

        Those of later steps go too: left by an attempt that was killed before it switched the pointer, or
        undone by a pointer that was set back.

        Raises:
            CheckpointError: If another attempt at the run has begun since this one did.
        """
        self._check_owner()
        final = self.folder / name_of(step)
        if final.exists():
            shutil.rmtree(final)
        self.beside(step).rename(final)
        _replace_text(self.folder / "latest", final.name)
        self._written.add(step)
        finished = {found for path in self.folder.iterdir() if (found := step_of(path.name)) >= 0}
        counting = {
            found
            for found in finished
            if found <= step and (found <= self._resumed or found in self._written)
        }
        for removed in finished - self.retention.kept(counting):
            shutil.rmtree(self.folder / name_of(removed))
        return final

    def _check_owner(self) -> None:
        if (self.folder / "owner").read_text(encoding="utf-8") != self.owner:
            raise CheckpointError(
                f"another attempt at this run writes to {self.folder}: let it go on, or stop it first"
            )


def first_valid(
    candidates: Sequence[Path],
    damage_of: Callable[[Path], str | None],
    restore: Callable[[], Path | None],
    *,
    quiet: bool = False,
) -> Path | None:
    """The first of some checkpoints that is sound.

    Args:
        candidates: Checkpoints, newest first.
        damage_of: What is wrong with one, None if nothing is.
        restore: Gets one from elsewhere where none is sound.
        quiet: Do not log damaged candidates that were passed over: another process reports them.

    Returns:
        Its folder; None if there are no candidates, nor one elsewhere.

    Raises:
        CheckpointError: If there are some, all are damaged, and there is none elsewhere.
    """
    damaged: list[str] = []
    for path in candidates:
        damage = damage_of(path)
        if damage is None:
            if damaged and not quiet:
                logger.warning(
                    "%s: %s: taking %s instead", path.parent, "; ".join(damaged), path.name
                )
            return path
        damaged.append(f"{path.name} {damage}")
    restored = restore()
    if damaged and restored is None:
        raise CheckpointError(
            f"{candidates[0].parent}: no sound checkpoint is left ({'; '.join(damaged)}): "
            "put one back, or delete the folder to begin anew"
        )
    return restored


def latest_valid(
    store: CheckpointStore,
    *,
    thorough: bool = True,
    quiet: bool = False,
) -> Path | None:
    """The newest sound checkpoint of a run, fetched from its mirror where none is on disk; None before the first.

    Args:
        store: The run's checkpoints.
        thorough: Whether to read all files of a checkpoint; without, of large ones only the sizes are looked at.
        quiet: Do not log damaged checkpoints that were passed over: another process reports them.

    Raises:
        CheckpointError: If there are some, and none is sound.
    """
    damage_of = partial(find_damage, thorough=thorough)
    return first_valid(store.candidates(), damage_of, store.restore, quiet=quiet)


def base_checkpoint(
    recipe: Recipe, find: Callable[[CheckpointStore], Path | None] = latest_valid
) -> Path | None:
    """The checkpoint that a run starts from, None if it starts from initial weights or from a foreign base.

    Args:
        recipe: The run.
        find: Gives the newest sound checkpoint of the base.

    Raises:
        CheckpointError: If the recipe names a base that has no sound checkpoint, or is not finished.
    """
    if not isinstance(recipe.base, str):
        return None
    store = CheckpointStore.from_recipe(recipe, recipe.base)
    path = find(store)
    if path is None:
        raise CheckpointError(
            f"base={recipe.base} has no checkpoint in {store.folder}: train it first with jobs/train.py"
        )
    info = CheckpointInfo.read(path)
    if not info.is_finished:
        raise CheckpointError(
            f"base={recipe.base} stands at step {info.step} of {info.num_steps}: "
            "finish it first with jobs/train.py"
        )
    return path


def acquire_writer_token(folder: Path) -> str:
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
