"""Checkpoints written behind the loop by several processes: exact, and sound or not counted, whatever happens."""

from __future__ import annotations

import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.multiprocessing.spawn import ProcessRaisedException

from ul2r.config import Recipe
from ul2r.testing.corpus import tiny_store
from ul2r.testing.distributed import run_distributed
from ul2r.testing.recipes import tiny_recipe
from ul2r.train.checkpoint.checksums import find_damage

pytestmark = pytest.mark.distributed

Losses = dict[int, float]
TWO = {"num_workers": 2}


def train(recipe: Recipe, stop_after: int | None = None) -> tuple[Losses, list[str], list[str]]:
    """Loss of each step taken, what was said, and the names of the metrics of checkpoints.

    Args:
        recipe: The run.
        stop_after: Rank 1 wishes to stop after this step.
    """
    import torch.distributed as dist

    from ul2r.launch.logs import forward_logs
    from ul2r.launch.worker import run_worker
    from ul2r.tracking.tracker import MemoryTracker
    from ul2r.train.loop import LoopAction

    tracker, said, asked = MemoryTracker(), list[str](), list[int]()
    rank = dist.get_rank()

    def wish() -> LoopAction:
        asked.append(1)
        stops = rank == 1 and len(asked) == stop_after
        return LoopAction.STOP if stops else LoopAction.CONTINUE

    with forward_logs(lambda *record: said.append(record[-1]), rank):
        run_worker(recipe, tracker, lambda *_: None, wish=wish)
    names = {name for _, metrics in tracker.records for name in metrics}
    found = sorted(name for name in names if name.startswith("checkpoint/"))
    return dict(tracker.series("train/loss")), said, found


def train_with_small_files(recipe: Recipe) -> None:
    """Train where rank 1 may not write what a checkpoint takes."""
    import torch.distributed as dist

    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    train(recipe)


def save_and_change(folder: Path) -> list[float]:
    """Begin to save a tensor of each rank and one of both, change them at once, and load: what is found in each."""
    import torch
    import torch.distributed as dist
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    from ul2r.config import Parallel
    from ul2r.train.checkpoint.async_write import AsyncWrite
    from ul2r.train.mesh import Mesh

    rank = Mesh.join(Parallel(num_workers=2)).rank
    own, common = torch.full((2**21,), 1.0 + rank), torch.full((2**21,), 3.0)
    state = {
        "own": ShardedTensor.from_rank_offsets("own", own, (0, rank, 2)),
        "common": ShardedTensor.from_rank_offsets("common", common, replica_id=rank),
    }
    assert dist.group.WORLD is not None
    write = AsyncWrite(dict(state), folder, dist.group.WORLD)
    own.fill_(7.0)
    common.fill_(7.0)
    assert write.wait() is None
    write.finalize()
    dist.barrier()
    loaded = dist_checkpointing.load(dict(state), str(folder))
    return [value for name in state for value in torch.unique(loaded[name]).tolist()]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saving")
    tiny_store(folder / "store")
    return folder


def run_named(storage: Path, name: str, **checkpoints: Any) -> Recipe:  # noqa: ANN401  of a recipe
    return tiny_recipe(
        storage, name=name, parallel=TWO, checkpoints={"every": 2, "keep": 3, **checkpoints}
    )


def checkpoint(recipe: Recipe, step: int) -> Path:
    return recipe.paths.checkpoints / f"step_{step:08d}"


@pytest.fixture(scope="module")
def whole(storage: Path) -> tuple[Recipe, Losses]:
    """A run of which nothing disturbed, its checkpoints copied to a folder elsewhere."""
    recipe = run_named(storage, "whole", remote_dir=str(storage / "far"))
    losses, said, metrics = run_distributed(train, 2, recipe)[0]
    assert said == []
    assert metrics == [
        "checkpoint/bytes",
        "checkpoint/save_seconds",
        "checkpoint/stall_seconds",
    ]
    return recipe, losses


def started_like(whole: Recipe, name: str, **checkpoints: Any) -> Recipe:  # noqa: ANN401
    """Another run with the checkpoints of `whole`."""
    recipe = run_named(whole.storage, name, **checkpoints)
    shutil.copytree(whole.paths.folder, recipe.paths.folder)
    return recipe


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def largest(folder: Path) -> Path:
    return max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)


def test_every_checkpoint_and_its_copy_is_whole(whole: tuple[Recipe, Losses]) -> None:
    recipe, _ = whole
    for step in (2, 4, 6):
        copy = recipe.storage / "far" / "whole" / f"step_{step:08d}"
        assert find_damage(checkpoint(recipe, step)) is None
        assert find_damage(copy) is None
    folders = {path.name for path in (recipe.paths.checkpoints).glob("[!.]*")}
    assert folders == {"latest", "owner", *(f"step_0000000{step}" for step in (2, 4, 6))}


def test_what_is_saved_is_not_changed_by_what_comes_after(tmp_path: Path) -> None:
    assert run_distributed(save_and_change, 2, tmp_path) == [[1.0, 3.0], [2.0, 3.0]]


def test_replicas_share_the_writing(whole: tuple[Recipe, Losses]) -> None:
    sizes = [
        sum(path.stat().st_size for path in checkpoint(whole[0], 6).glob(f"__{rank}_*.distcp"))
        for rank in range(2)
    ]
    assert 0.8 < sizes[0] / sizes[1] < 1.25


def test_saving_with_the_loop_waiting_gives_the_same_run(
    storage: Path, whole: tuple[Recipe, Losses]
) -> None:
    recipe = run_named(storage, "waiting", asynchronous=False)
    losses, _, _ = run_distributed(train, 2, recipe)[0]
    assert losses == whole[1]


def test_a_changed_bit_is_noticed_and_the_checkpoint_before_is_taken(
    whole: tuple[Recipe, Losses],
) -> None:
    recipe = started_like(whole[0], "bit")
    flip(largest(checkpoint(recipe, 6)))
    flip(largest(checkpoint(recipe, 4)))
    (losses, said, metrics), (_, said_by_others, _) = run_distributed(train, 2, recipe)
    assert losses == {step: whole[1][step] for step in (3, 4, 5, 6)}
    assert len(said) == 1
    assert "step_00000006 has a __" in said[0]
    assert said[0].endswith("whose SHA-256 is not the one written: using step_00000002 instead")
    assert said_by_others == []
    assert "checkpoint/load_seconds" in metrics
    assert find_damage(checkpoint(recipe, 6)) is None


def test_a_damaged_base_is_refused_by_every_rank(whole: tuple[Recipe, Losses]) -> None:
    base = started_like(whole[0], "bad-base")
    flip(largest(checkpoint(base, 6)))
    recipe = run_named(base.storage, "on-bad-base").model_copy(update={"base": "bad-base"})
    with pytest.raises(
        ProcessRaisedException, match="base=bad-base is at step 4 of 6: finish it first"
    ):
        run_distributed(train, 2, recipe)


def test_a_run_whose_disk_is_gone_goes_on_from_its_copy(whole: tuple[Recipe, Losses]) -> None:
    recipe = run_named(whole[0].storage, "whole", remote_dir=str(whole[0].storage / "far"))
    moved = recipe.model_copy(update={"storage": whole[0].storage / "fresh"})
    shutil.copytree(recipe.storage_paths.store, moved.storage_paths.store)
    (recipe.storage / "far" / "whole" / "latest").write_text("step_00000004")
    losses, said, _ = run_distributed(train, 2, moved)[0]
    assert losses == {step: whole[1][step] for step in (5, 6)}
    assert said == [
        f"{moved.paths.folder}/checkpoints: step_00000004 was downloaded from {recipe.storage}/far/whole"
    ]
    assert (recipe.storage / "far" / "whole" / "latest").read_text() == "step_00000006"


def test_a_last_copy_that_fails_is_an_error_and_the_checkpoint_itself_is_there(
    storage: Path,
) -> None:
    (storage / "blocked").write_text("a file, where a folder is to be")
    recipe = run_named(storage, "uncopied", remote_dir=str(storage / "blocked"))
    with pytest.raises(
        ProcessRaisedException,
        match=r"CheckpointError: checkpoints cannot be uploaded to .*/blocked",
    ):
        run_distributed(train, 2, recipe)
    assert find_damage(checkpoint(recipe, 6)) is None
    assert (recipe.paths.checkpoints / "latest").read_text() == "step_00000006"


def test_one_rank_that_wishes_to_stop_stops_all_after_a_checkpoint(
    storage: Path, whole: tuple[Recipe, Losses]
) -> None:
    recipe = run_named(storage, "stopped")
    losses, _, _ = run_distributed(train, 2, recipe, 3)[0]
    assert losses == {step: whole[1][step] for step in (1, 2, 3)}
    rest, _, _ = run_distributed(train, 2, recipe)[0]
    assert rest == {step: whole[1][step] for step in (4, 5, 6)}


def test_one_rank_that_cannot_write_stops_all_and_leaves_the_checkpoint_before(
    whole: tuple[Recipe, Losses],
) -> None:
    recipe = started_like(whole[0], "small-files")
    (recipe.paths.checkpoints / "latest").write_text("step_00000002")
    with pytest.raises(
        ProcessRaisedException,
        match=r"CheckpointError: checkpoint of step 4 cannot be written to .*: File too large. The previous checkpoint is intact",
    ):
        run_distributed(train_with_small_files, 2, recipe)
    assert not list((recipe.paths.checkpoints).glob("*.writing"))
    losses, _, _ = run_distributed(train, 2, recipe)[0]
    assert losses == {step: whole[1][step] for step in (3, 4, 5, 6)}


def mount(folder: Path, *options: str) -> None:
    done = subprocess.run(
        ["mount", *options, "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"a small disk needs the right to mount one: {done.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk that two checkpoints do not fit on."""
    mount(tmp_path, "-t", "tmpfs", "-o", "size=2500k")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_disk_is_told_in_one_line_and_the_run_goes_on_when_there_is_room(
    small_disk: Path, whole: tuple[Recipe, Losses]
) -> None:
    recipe = run_named(small_disk, "full")
    shutil.copytree(whole[0].storage_paths.store, recipe.storage_paths.store)
    with pytest.raises(
        ProcessRaisedException,
        match=r"CheckpointError: checkpoint .*cannot be written.*: .*(No space left|full disk).* The previous checkpoint is intact",
    ):
        run_distributed(train, 2, recipe)
    before = [path for path in (recipe.paths.checkpoints).iterdir() if "step" in path.name]
    assert before
    assert all(find_damage(path) is None for path in before if not path.suffix)
    mount(small_disk, "-o", "remount,size=25m")
    losses, said, _ = run_distributed(train, 2, recipe)[0]
    assert losses == {step: whole[1][step] for step in range(7 - len(losses), 7)}
    assert len(losses) < 6, "it began anew instead of going on"
    assert said == []
