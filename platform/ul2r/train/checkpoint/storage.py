"""The checkpoints of a run on disk: written in a staging folder, renamed, then the `latest` pointer is switched.

`layout.py` draws the folder. Nothing here needs torch or Megatron-Core, so a driver can look at checkpoints without
importing them.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from ul2r.config import Recipe
from ul2r.errors import CheckpointError
from ul2r.filesystem import (
    PREVIOUS_SUFFIX,
    STAGING_SUFFIX,
    file_lock,
    remove,
    replace_dir,
    staging_path,
    write_atomically,
)
from ul2r.train.checkpoint.checksums import find_damage
from ul2r.train.checkpoint.layout import (
    LATEST_FILE,
    WRITER_TOKEN_FILE,
    checkpoint_name,
    lineage_of,
    list_up_to,
    parse_step,
)
from ul2r.train.checkpoint.metadata import CheckpointInfo
from ul2r.train.checkpoint.remote import RemoteCheckpoints
from ul2r.train.checkpoint.retention import Retention

logger = logging.getLogger(__name__)


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: The run's checkpoint folder.
        retention: Which finished checkpoints to keep.
        writer_token: Token of the attempt that writes, from `acquire_writer_token`; None for a store that only reads.
        remote: Remote copies of the checkpoints, None without.
    """

    def __init__(
        self,
        folder: Path,
        retention: Retention | None = None,
        writer_token: str | None = None,
        remote: RemoteCheckpoints | None = None,
    ) -> None:
        self.folder = folder
        self.retention = retention or Retention()
        self.writer_token = writer_token
        self.remote = remote
        # The checkpoints that this attempt may count as valid, see `_find_expired`.
        self._resumed_step = 0
        self._written_steps: set[int] = set()
        self._leftovers: list[Path] = []

    @classmethod
    def from_recipe(
        cls, recipe: Recipe, run: str | None = None, writer_token: str | None = None
    ) -> CheckpointStore:
        """Open the checkpoints of a recipe's run, or of another run in the same storage."""
        settings = recipe.checkpoints
        name = run or recipe.name
        return cls(
            recipe.storage_paths.run(name).checkpoints,
            Retention(settings.keep, settings.keep_every),
            writer_token,
            RemoteCheckpoints(settings.remote_dir, name, writer_token)
            if settings.remote_dir
            else None,
        )

    def list_checkpoints(self) -> list[Path]:
        """Return the finished checkpoints up to `latest`, newest first; they are not verified."""
        try:
            # A damaged pointer may be anything, not only UTF-8; `list_up_to` then ignores it.
            pointer = (self.folder / LATEST_FILE).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return []
        names = (path.name for path in self.folder.iterdir() if path.is_dir())
        return [self.folder / name for name in list_up_to(pointer, names)]

    def restore(self) -> Path | None:
        """Download the last remote checkpoint; return None if there is none.

        Raises:
            CheckpointError: If the remote folder cannot be read, or holds no valid checkpoint.
        """
        if self.remote is None or not self.remote.has_checkpoint():
            return None

        # Several processes may find at the same moment that the disk has no checkpoint.
        self.folder.mkdir(parents=True, exist_ok=True)
        with file_lock(self.folder / ".restoring"):
            # Another process may have restored it while this one waited for the lock.
            for path in self.list_checkpoints():
                if find_damage(path) is None:
                    return path

            path = self.remote.download(self.folder)
            write_atomically(self.folder / LATEST_FILE, path.name)
            logger.info("%s: %s was downloaded from %s", self.folder, path.name, self.remote.url)
        return path

    def start_attempt(self, resumed_step: int = 0) -> None:
        """Remove unfinished checkpoints of killed attempts and claim the remote folder; call before the first save.

        Only rank 0 calls it.

        Args:
            resumed_step: Step that this attempt resumes from. Checkpoints of later steps, which are damaged or were
                undone by resetting `latest`, are removed by the first `publish`.

        Raises:
            CheckpointError: If another attempt at the run has begun since this one did, or the remote folder has the
                copies of a run in another storage.
        """
        self._check_writer_token()
        self._resumed_step = resumed_step
        for suffix in (STAGING_SUFFIX, PREVIOUS_SUFFIX):
            for path in self.folder.glob(f"*{suffix}"):
                # Only folders: a file may be the token that a newer attempt is writing at this moment.
                if path.is_dir():
                    remove(path)
        if self.remote is not None:
            resumed = self.folder / checkpoint_name(resumed_step) if resumed_step else None
            self.remote.claim(resumed)

    def staging_dir(self, step: int) -> Path:
        """Folder in which this attempt writes the checkpoint of a step; no other attempt uses the same one."""
        return self.folder / f"{checkpoint_name(step)}.{self.writer_token}{STAGING_SUFFIX}"

    def create_staging_dir(self, step: int) -> None:
        """Create the staging folder of a step.

        Raises:
            CheckpointError: If another attempt at the run has begun since this one did.
        """
        self._check_writer_token()
        self.staging_dir(step).mkdir()

    def discard(self, step: int) -> None:
        """Remove the staging folder of a step, whose checkpoint could not be written."""
        remove(self.staging_dir(step))

    def publish(self, step: int, may_remove: Callable[[Path], bool] = lambda _: True) -> Path:
        """Turn the complete staging folder of a step into the latest checkpoint, then remove those not kept.

        Checkpoints of later steps are removed too: they were left by an attempt that was killed before it switched
        the pointer, or undone by resetting the pointer.

        Args:
            step: The step.
            may_remove: Returns whether a checkpoint may be removed now; it is not while it is being copied.

        Returns:
            The checkpoint's folder.

        Raises:
            CheckpointError: If another attempt at the run has begun since this one did.
        """
        self._check_writer_token()
        final = self.folder / checkpoint_name(step)

        # Rename, then switch the pointer, then remove: a crash in between leaves `latest` naming a complete checkpoint.
        replace_dir(self.staging_dir(step), final)
        write_atomically(self.folder / LATEST_FILE, final.name)
        self._written_steps.add(step)
        self.remove_expired(may_remove)
        return final

    def remove_expired(self, may_remove: Callable[[Path], bool] = lambda _: True) -> None:
        """Remove the checkpoints that are not kept, if this attempt has written any; see `publish`.

        What cannot be removed is tried again at the next call: the new checkpoint is complete, so training goes on.
        """
        self._leftovers = [path for path in self._leftovers if not remove(path)]
        if not self._written_steps:
            return
        latest_step = parse_step(self.list_checkpoints()[0].name)
        assert latest_step is not None
        for old_step in sorted(self._find_expired(latest_step)):
            path = self.folder / checkpoint_name(old_step)
            if may_remove(path):
                self._remove_checkpoint(path)

    def _remove_checkpoint(self, path: Path) -> None:
        # Renamed first, which succeeds where removing does not (NFS, files that are open elsewhere): what has a
        # checkpoint's name is complete, and counts for retention.
        leftover = staging_path(path)
        try:
            path.rename(leftover)
        except OSError:
            # Found again by `_find_expired`.
            remove(path)
            return
        if not remove(leftover):
            self._leftovers.append(leftover)

    def _find_expired(self, latest_step: int) -> set[int]:
        """Return the steps of finished checkpoints that are not kept.

        A checkpoint between the resumed step and this attempt's own is damaged or undone; it must not count towards
        the number that is kept, else it would push out a valid one.
        """
        steps = {parse_step(path.name) for path in self.folder.iterdir()}
        finished = {step for step in steps if step is not None}
        trusted = {
            step
            for step in finished
            if step <= latest_step and (step <= self._resumed_step or step in self._written_steps)
        }
        return finished - self.retention.select_kept(trusted)

    def _check_writer_token(self) -> None:
        # Read before every change, and from the file: the other attempt may run on another machine.
        token = (self.folder / WRITER_TOKEN_FILE).read_text(encoding="utf-8")
        if token != self.writer_token:
            raise CheckpointError(
                f"another attempt at this run writes to {self.folder}: wait for it to finish, or stop it first"
            )


def first_valid(
    candidates: Sequence[Path],
    verify: Callable[[Path], str | None],
    restore: Callable[[], Path | None],
    *,
    quiet: bool = False,
) -> Path | None:
    """Return the first undamaged checkpoint.

    Args:
        candidates: Checkpoints, newest first.
        verify: Returns a description of the damage to a checkpoint, None if it is valid.
        restore: Returns a checkpoint from elsewhere, None if there is none; called if no candidate is valid.
        quiet: Do not log damaged candidates that were skipped: another process reports them.

    Returns:
        Its folder; None if there are no checkpoints at all.

    Raises:
        CheckpointError: If there are candidates but no valid checkpoint.
    """
    damaged: list[str] = []
    for path in candidates:
        damage = verify(path)
        if damage is None:
            if damaged and not quiet:
                logger.warning(
                    "%s: %s: using %s instead", path.parent, "; ".join(damaged), path.name
                )
            return path
        damaged.append(f"{path.name} {damage}")

    restored = restore()
    if damaged and restored is None:
        # Not treated as a new run: that would overwrite what may be recoverable.
        raise CheckpointError(
            f"{candidates[0].parent}: no valid checkpoint is left ({'; '.join(damaged)}): "
            "restore one, or delete the folder to start over"
        )
    return restored


def latest_valid(
    store: CheckpointStore,
    *,
    thorough: bool = True,
    quiet: bool = False,
) -> Path | None:
    """Return the newest valid checkpoint of a run, downloaded if none is on disk; None before the first.

    Args:
        store: The run's checkpoints.
        thorough: Whether to read all files of a checkpoint; if False, only the sizes of large files are checked.
        quiet: Do not log damaged checkpoints that were skipped: another process reports them.

    Raises:
        CheckpointError: If there are checkpoints but no valid one.
    """
    return first_valid(
        store.list_checkpoints(),
        partial(find_damage, thorough=thorough),
        store.restore,
        quiet=quiet,
    )


def find_base_checkpoint(
    recipe: Recipe, find: Callable[[CheckpointStore], Path | None] = latest_valid
) -> Path | None:
    """Return the checkpoint that a run starts from; None for initial weights and for a base from elsewhere.

    Args:
        recipe: The run.
        find: Returns the newest valid checkpoint of the base.

    Raises:
        CheckpointError: If the recipe names a base that has no valid checkpoint, or is not finished.
    """
    if not isinstance(recipe.base, str):
        return None

    store = CheckpointStore.from_recipe(recipe, recipe.base)
    path = find(store)
    if path is None:
        raise CheckpointError(
            f"base={recipe.base} has no checkpoint in {store.folder}: train it first with `ul2r train`"
        )

    info = CheckpointInfo.read(path)
    # A run continues from its base's last weights: those of an unfinished base depend on the moment.
    if not info.is_finished:
        raise CheckpointError(
            f"base={recipe.base} is at step {info.step} of {info.num_steps}: finish it first with `ul2r train`"
        )
    return path


def acquire_writer_token(folder: Path) -> str:
    """Begin an attempt at a run: from now on only it may write checkpoints to `folder`.

    The token fences off earlier attempts: one that is still running, such as workers whose driver was killed, fails
    at its next checkpoint. All tokens of a folder begin with the same random digits, before a dot: by these a remote
    copy tells the attempts at one run from those at a run of the same name in another storage.

    Returns:
        The token, for the attempt's `CheckpointStore`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    owner = folder / WRITER_TOKEN_FILE
    lineage = lineage_of(owner.read_text(encoding="utf-8")) if owner.is_file() else uuid.uuid4().hex
    token = f"{lineage}.{uuid.uuid4().hex}"
    write_atomically(owner, token)
    return token


def read_writer_token(folder: Path) -> str:
    """Return the token of the last attempt at a run; a new one if nothing was written there but a restored copy."""
    owner = folder / WRITER_TOKEN_FILE
    return owner.read_text(encoding="utf-8") if owner.is_file() else acquire_writer_token(folder)
