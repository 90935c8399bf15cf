"""Checkpoints that several processes write in the background: exact, and either valid or not used."""

from __future__ import annotations

import resource
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from torch.multiprocessing.spawn import ProcessRaisedException

from ul2r.config import Guards, Recipe
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.distributed import run_distributed
from ul2r.testing.recipes import tiny_recipe
from ul2r.train.checkpoint.checksums import find_damage

pytestmark = pytest.mark.distributed

Losses = dict[int, float]
PARALLEL = {"num_workers": 2}


@dataclass(frozen=True)
class TrainResult:
    """Outcome of a run on one rank.

    Attributes:
        losses: By step.
        messages: Lines that the run logged, without those of every start.
        metrics: Names of the metrics about checkpoints.
    """

    losses: Losses
    messages: list[str]
    metrics: list[str]


def train(recipe: Recipe, stop_after: int | None = None) -> TrainResult:
    """Train; if `stop_after` is given, rank 1 requests to stop after that many steps."""
    import torch.distributed as dist

    from ul2r.launch.logs import forward_logs
    from ul2r.launch.worker import run_worker
    from ul2r.tracking.tracker import MemoryTracker
    from ul2r.train.callbacks import Callback, LoopAction

    tracker = MemoryTracker()
    messages: list[str] = []
    num_requests = 0
    rank = dist.get_rank()

    class StopRequest(Callback):
        def requested_action(self) -> LoopAction:
            nonlocal num_requests
            num_requests += 1
            is_stopping = rank == 1 and num_requests == stop_after
            return LoopAction.STOP if is_stopping else LoopAction.CONTINUE

    def keep(logger_name: str, level: int, message: str) -> None:
        # The lines that every start prints are not about saving.
        if not logger_name.endswith("start_report") and "kernels:" not in message:
            messages.append(message)

    with forward_logs(keep, rank):
        run_worker(recipe, tracker, callbacks=[StopRequest()])

    names = {name for _, metrics in tracker.records for name in metrics}
    metrics = sorted(name for name in names if name.startswith("checkpoint/"))
    return TrainResult(dict(tracker.series("train/loss")), messages, metrics)


def train_with_small_files(recipe: Recipe) -> None:
    """Train while rank 1 may not write files as large as those of a checkpoint."""
    import torch.distributed as dist

    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    train(recipe)


def save_and_change(folder: Path) -> list[float]:
    """Save a tensor of each rank and a shared one, change both at once, and return the values found by loading."""
    import torch
    import torch.distributed as dist
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    from ul2r.config import Parallel
    from ul2r.train.checkpoint.async_write import AsyncWrite
    from ul2r.train.mesh import Mesh

    rank = Mesh.join(Parallel(num_workers=2)).rank
    own = torch.full((2**21,), 1.0 + rank)
    shared = torch.full((2**21,), 3.0)
    state = {
        "own": ShardedTensor.from_rank_offsets("own", own, (0, rank, 2)),
        "shared": ShardedTensor.from_rank_offsets("shared", shared, replica_id=rank),
    }

    assert dist.group.WORLD is not None
    write = AsyncWrite(dict(state), folder, dist.group.WORLD)
    own.fill_(7.0)
    shared.fill_(7.0)
    assert write.wait() is None
    write.finalize()
    dist.barrier()

    loaded = dist_checkpointing.load(dict(state), str(folder))
    return [value for name in state for value in torch.unique(loaded[name]).tolist()]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saving")
    make_tiny_store(folder / "store")
    return folder


def make_recipe(storage: Path, name: str, **checkpoints: Any) -> Recipe:  # noqa: ANN401  values of a recipe
    return tiny_recipe(
        storage, name=name, parallel=PARALLEL, checkpoints={"every": 2, "keep": 3, **checkpoints}
    )


def checkpoint(recipe: Recipe, step: int) -> Path:
    return recipe.paths.checkpoints / f"step_{step:08d}"


@pytest.fixture(scope="module")
def undisturbed(storage: Path) -> tuple[Recipe, Losses]:
    """An undisturbed run whose checkpoints were uploaded."""
    recipe = make_recipe(storage, "undisturbed", remote_dir=str(storage / "far"))
    result = run_distributed(train, 2, recipe)[0]
    assert result.messages == []
    assert result.metrics == [
        "checkpoint/bytes",
        "checkpoint/save_seconds",
        "checkpoint/stall_seconds",
    ]
    return recipe, result.losses


def copy_run(source: Recipe, name: str, **checkpoints: Any) -> Recipe:  # noqa: ANN401  values of a recipe
    """Make another run with the checkpoints of `source`."""
    recipe = make_recipe(source.storage, name, **checkpoints)
    shutil.copytree(source.paths.folder, recipe.paths.folder)
    return recipe


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def largest_file(folder: Path) -> Path:
    return max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)


def test_every_checkpoint_and_its_remote_copy_is_valid(undisturbed: tuple[Recipe, Losses]) -> None:
    recipe, _ = undisturbed
    for step in (2, 4, 6):
        copy = recipe.storage / "far" / "undisturbed" / f"step_{step:08d}"
        assert find_damage(checkpoint(recipe, step)) is None
        assert find_damage(copy) is None
    names = {path.name for path in recipe.paths.checkpoints.glob("[!.]*")}
    assert names == {"latest", "owner", *(f"step_0000000{step}" for step in (2, 4, 6))}


def test_changes_after_save_returns_are_not_saved(tmp_path: Path) -> None:
    assert run_distributed(save_and_change, 2, tmp_path) == [[1.0, 3.0], [2.0, 3.0]]


def test_replicas_share_the_writing(undisturbed: tuple[Recipe, Losses]) -> None:
    folder = checkpoint(undisturbed[0], 6)
    sizes = [
        sum(path.stat().st_size for path in folder.glob(f"__{rank}_*.distcp")) for rank in range(2)
    ]
    assert 0.8 < sizes[0] / sizes[1] < 1.25


def test_synchronous_saving_gives_the_same_run(
    storage: Path, undisturbed: tuple[Recipe, Losses]
) -> None:
    recipe = make_recipe(storage, "synchronous", asynchronous=False)
    result = run_distributed(train, 2, recipe)[0]
    assert result.losses == undisturbed[1]


def test_run_resumes_before_checkpoints_with_a_flipped_bit(
    undisturbed: tuple[Recipe, Losses],
) -> None:
    recipe = copy_run(undisturbed[0], "bit")
    flip_bit(largest_file(checkpoint(recipe, 6)))
    flip_bit(largest_file(checkpoint(recipe, 4)))

    result, other = run_distributed(train, 2, recipe)
    assert result.losses == {step: undisturbed[1][step] for step in (3, 4, 5, 6)}
    (message,) = result.messages
    assert "step_00000006 has a __" in message
    assert message.endswith("whose SHA-256 is not the one written: using step_00000002 instead")
    assert other.messages == []
    assert "checkpoint/load_seconds" in result.metrics
    assert find_damage(checkpoint(recipe, 6)) is None


def test_damaged_base_is_refused_by_every_rank(undisturbed: tuple[Recipe, Losses]) -> None:
    base = copy_run(undisturbed[0], "bad-base")
    flip_bit(largest_file(checkpoint(base, 6)))
    recipe = make_recipe(base.storage, "on-bad-base").model_copy(update={"base": "bad-base"})
    with pytest.raises(
        ProcessRaisedException, match="base=bad-base is at step 4 of 6: finish it first"
    ):
        run_distributed(train, 2, recipe)


def test_run_whose_disk_is_lost_resumes_from_the_remote_copy(
    undisturbed: tuple[Recipe, Losses],
) -> None:
    storage = undisturbed[0].storage
    far = storage / "far" / "undisturbed"
    recipe = make_recipe(storage, "undisturbed", remote_dir=str(storage / "far"))
    moved = recipe.model_copy(update={"storage": storage / "fresh"})
    shutil.copytree(recipe.storage_paths.store, moved.storage_paths.store)
    (far / "latest").write_text("step_00000004")

    result = run_distributed(train, 2, moved)[0]
    assert result.losses == {step: undisturbed[1][step] for step in (5, 6)}
    assert result.messages == [
        f"{moved.paths.checkpoints}: step_00000004 was downloaded from {far}"
    ]
    assert (far / "latest").read_text() == "step_00000006"


def test_failure_of_the_last_upload_is_an_error_that_leaves_the_checkpoint(storage: Path) -> None:
    (storage / "blocked").write_text("a file instead of a folder")
    recipe = make_recipe(storage, "not-uploaded", remote_dir=str(storage / "blocked"))
    with pytest.raises(
        ProcessRaisedException,
        match=r"CheckpointError: checkpoints cannot be uploaded to .*/blocked",
    ):
        run_distributed(train, 2, recipe)
    assert find_damage(checkpoint(recipe, 6)) is None
    assert (recipe.paths.checkpoints / "latest").read_text() == "step_00000006"


def test_prolonged_run_equals_one_that_was_as_long_from_the_start(storage: Path) -> None:
    """Both warm up for one step."""

    def recipe(name: str, steps: int) -> Recipe:
        optimizer = {"schedule": "constant", "warmup_fraction": 1 / steps}
        return tiny_recipe(
            storage,
            name=name,
            parallel=PARALLEL,
            training={"steps": steps},
            optimizer=optimizer,
            checkpoints={"every": 2},
        )

    whole = run_distributed(train, 2, recipe("whole", 6))[0]
    short = run_distributed(train, 2, recipe("prolonged", 4))[0]
    rest = run_distributed(train, 2, recipe("prolonged", 6))[0]
    assert short.losses | rest.losses == whole.losses
    assert list(rest.losses) == [5, 6]


class GatedFileSystem(LocalFileSystem):  # type: ignore[misc]  # fsspec has no types
    """Folders that take no file of a checkpoint before the last one of a run is complete."""

    protocol = "gated"
    pointer: Path

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("gated://")))

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:  # noqa: ANN401  fsspec's own
        is_open = mode != "wb" or path.endswith("/owner")
        while not is_open and self.pointer.read_text() != "step_00000006":
            time.sleep(0.01)
        return super()._open(path, mode, **options)


def train_with_slow_copies(recipe: Recipe, stop_after: int | None = None) -> TrainResult:
    fsspec.register_implementation("gated", GatedFileSystem)
    GatedFileSystem.pointer = recipe.paths.checkpoints / "latest"
    return train(recipe, stop_after)


def test_copies_slower_than_training_hold_up_nothing(
    storage: Path, undisturbed: tuple[Recipe, Losses]
) -> None:
    """The copy of the first checkpoint takes longer than the rest of the run; the second is left out."""
    far = storage / "slow"
    recipe = make_recipe(storage, "slow-copies", keep=1, remote_dir=f"gated://{far}")
    # On failure the watchdog ends what would hang for ever.
    recipe = recipe.model_copy(update={"guards": Guards(hang_timeout_s=60)})
    result = run_distributed(train_with_slow_copies, 2, recipe)[0]
    assert result.losses == undisturbed[1]
    (message,) = result.messages
    assert message.startswith(
        f"step_00000004 is not copied to gated://{far}/slow-copies: copies are slower than checkpoints (step_00000002: "
    )
    assert find_damage(far / "slow-copies" / "step_00000006") is None
    assert (far / "slow-copies" / "latest").read_text() == "step_00000006"
    assert [path.name for path in recipe.paths.checkpoints.glob("step_*")] == ["step_00000006"]


def test_stop_requested_by_one_rank_stops_all_after_a_checkpoint(
    storage: Path, undisturbed: tuple[Recipe, Losses]
) -> None:
    """The stop does not wait for copies; the next attempt makes that of the last checkpoint."""
    far = storage / "stopped-far"
    recipe = make_recipe(storage, "stopped", remote_dir=f"gated://{far}")
    # On failure the watchdog ends what would hang for ever.
    recipe = recipe.model_copy(update={"guards": Guards(hang_timeout_s=60)})
    first = run_distributed(train_with_slow_copies, 2, recipe, 3)[0]
    assert first.losses == {step: undisturbed[1][step] for step in (1, 2, 3)}
    (message,) = first.messages
    assert message.startswith(
        f"the run stops without waiting for its copy to gated://{far}/stopped"
    )
    rest = run_distributed(train_with_slow_copies, 2, recipe)[0]
    assert find_damage(far / "stopped" / "step_00000003") is None
    assert rest.losses == {step: undisturbed[1][step] for step in (4, 5, 6)}


def test_rank_that_cannot_write_stops_all_and_leaves_the_previous_checkpoint(
    undisturbed: tuple[Recipe, Losses],
) -> None:
    recipe = copy_run(undisturbed[0], "small-files")
    (recipe.paths.checkpoints / "latest").write_text("step_00000002")
    error = (
        r"checkpoint of step 4 cannot be written to .*: File too large\. The previous checkpoint is"
    )
    with pytest.raises(ProcessRaisedException, match=f"CheckpointError: {error}"):
        run_distributed(train_with_small_files, 2, recipe)
    assert not list(recipe.paths.checkpoints.glob("*.writing"))

    result = run_distributed(train, 2, recipe)[0]
    assert result.losses == {step: undisturbed[1][step] for step in (3, 4, 5, 6)}


def mount(folder: Path, *options: str) -> None:
    done = subprocess.run(
        ["mount", *options, "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"needs the permission to mount a small disk: {done.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk with room for one checkpoint."""
    mount(tmp_path, "-t", "tmpfs", "-o", "size=2500k")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_full_disk_is_reported_in_one_line_and_the_run_resumes_once_there_is_room(
    small_disk: Path, undisturbed: tuple[Recipe, Losses]
) -> None:
    recipe = make_recipe(small_disk, "full")
    shutil.copytree(undisturbed[0].storage_paths.store, recipe.storage_paths.store)
    reason = r"(No space left|full disk).*\. The previous checkpoint is intact"
    with pytest.raises(
        ProcessRaisedException,
        match=rf"CheckpointError: checkpoint .*cannot be written.*: .*{reason}",
    ):
        run_distributed(train, 2, recipe)
    left = [path for path in recipe.paths.checkpoints.iterdir() if "step" in path.name]
    assert left
    assert all(find_damage(path) is None for path in left if not path.suffix)

    mount(small_disk, "-o", "remount,size=25m")
    result = run_distributed(train, 2, recipe)[0]
    num_steps = len(result.losses)
    assert num_steps < 6, "it started over instead of resuming"
    assert result.losses == {step: undisturbed[1][step] for step in range(7 - num_steps, 7)}
    assert result.messages == []
