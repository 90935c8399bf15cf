"""From text to a token store: train a tokenizer, tokenize files in parallel, merge the shards.

The work is done in a folder next to the store, which becomes the store when a shuffled one is complete; a streamed
store appears with its first segment. If `prepare` is interrupted and run again with the same inputs, it continues after
the shards that were finished.
"""

from __future__ import annotations

import logging
import shutil
import uuid
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from ul2r.config import Data, Recipe
from ul2r.console import show_progress
from ul2r.data.prepare.inputs import (
    collect_inputs,
    describe_difference,
    digest_earlier_listing,
    digest_inputs,
    list_data,
)
from ul2r.data.prepare.left_out import LeftOut
from ul2r.data.prepare.merge import HeldOutLimits, merge_shards
from ul2r.data.prepare.round_trip import (
    SAMPLE_CHARACTERS,
    check_round_trip,
    measure_round_trip,
)
from ul2r.data.prepare.sample_text import sample_evenly, sample_text
from ul2r.data.prepare.shards import group_files, is_shard_done, load_left_out
from ul2r.data.prepare.source_files import CorpusListing, SourceFile
from ul2r.data.prepare.streaming import StreamingStoreBuilder, group_streamed_files
from ul2r.data.prepare.tokenize_shards import tokenize_shards
from ul2r.data.special_tokens import assign_special_tokens
from ul2r.data.store.blend import write_blend
from ul2r.data.store.dataset import open_dataset
from ul2r.data.store.manifest import Manifest
from ul2r.data.store.segments import WORK_PREFIX
from ul2r.data.tokenizer import build_vocabulary, load_tokenizer, train_tokenizer
from ul2r.errors import CorpusError, RecipeError, ServiceError, UserError
from ul2r.filesystem import file_lock, remove, staged_file
from ul2r.objective import Vocabulary
from ul2r.paths import TOKENIZER_FILE

logger = logging.getLogger(__name__)

MAX_TRAINING_CHARACTERS = 2**25
"""Characters that a tokenizer is trained on, at most."""
MEGABYTE = 1e6
ABANDONED = "abandoned-"
"""Begins the name of a work folder that is being removed, after the prefix of all work folders."""


def load_finished(recipe: Recipe) -> Manifest | None:
    """Return the manifest of the recipe's token store, or None if it is missing or incomplete.

    Raises:
        CorpusError: If the text cannot be found, or a store made from other inputs is in the way.
    """
    manifest = check_resumable(recipe)
    return manifest if manifest is not None and manifest.is_complete else None


def check_resumable(recipe: Recipe) -> Manifest | None:
    """Check that the recipe's token store, if there is one, was made from the recipe's inputs, and return its manifest.

    Unlike `load_finished`, it also returns the manifest of a streamed store that is not complete yet.

    Raises:
        CorpusError: As `load_finished`.
    """
    inputs = collect_inputs(recipe.data)
    store = recipe.storage_paths.store
    if not store.exists():
        return None
    manifest = open_dataset(store).manifest
    difference = describe_difference(manifest.inputs, inputs)
    # A streamed store that is not complete is continued with the files as they are listed now.
    if difference and manifest.is_complete and not recipe.data.blend:
        earlier = digest_earlier_listing(recipe.data)
        difference = describe_difference(manifest.inputs, inputs, earlier)
    if difference:
        raise CorpusError(
            f"{store}: {difference}: set storage to another folder, or delete {store}"
        )
    return manifest


def prepare(recipe: Recipe) -> Manifest:
    """Make the recipe's token store on the connected Ray cluster; a blend of stores needs no cluster.

    Storage and corpus must be on file systems that every node of the cluster can reach.

    Raises:
        CorpusError: If the text cannot be read; storage is then left as it was, or with the segments that a streamed
            store already had.
        RecipeError: If storage is not writable, or the vocabulary is too small for its special tokens.
    """
    store = recipe.storage_paths.store
    if recipe.data.order == "streamed":
        _show_bytes(build_streaming_store(recipe), count_corpus_bytes(recipe))
        return open_dataset(store).manifest

    inputs = collect_inputs(recipe.data)
    work_folder = _make_work_folder(recipe, inputs)
    with _remove_on_user_error(work_folder):
        if recipe.data.blend:
            manifest = write_blend(work_folder, inputs)
        else:
            manifest = _build_shuffled_store(
                work_folder, recipe.data, list_data(recipe.data), inputs
            )
    # Within one folder, hence one file system, a rename is atomic: nobody sees a store that is not whole.
    work_folder.replace(store)
    return manifest


def build_streaming_store(recipe: Recipe, cpus: float | None = None) -> Generator[int]:
    """Build what is missing of the recipe's streamed store on the connected Ray cluster.

    Args:
        recipe: Its corpus and storage must be on file systems that every node of the cluster can reach.
        cpus: CPUs to use; all by default.

    Yields:
        Bytes of text tokenized so far.

    Raises:
        UserError: As `prepare`.
    """
    listing = list_data(recipe.data)
    inputs = collect_inputs(recipe.data)
    store = recipe.storage_paths.store
    _make_folder(recipe, store.parent)
    if listing.left_out:
        # A run that trains meanwhile prints no summary of its store.
        logger.info("data.corpus: left out %s", listing.left_out.describe())

    # A run and `ul2r prepare` may both build the store; the second one waits, then finds it complete.
    with file_lock(store):
        if store.exists() and Manifest.read(store).is_complete:
            return
        work_folder = _make_work_folder(recipe, inputs)
        with _remove_on_user_error(work_folder):
            if store.exists():
                # A user error removed the work folder but left the store's segments: the next ones need the same
                # tokenizer.
                shutil.copyfile(store / TOKENIZER_FILE, work_folder / TOKENIZER_FILE)
            vocabulary = _make_tokenizer(work_folder, recipe.data, listing.files)
            builder = StreamingStoreBuilder(
                folder=store,
                work_folder=work_folder,
                groups=group_streamed_files(listing.files),
                held_out=_held_out_limits(recipe.data),
                vocabulary=vocabulary,
                inputs=inputs,
                left_out=listing.left_out,
                round_trip=_measure_round_trip(work_folder, recipe.data, listing.files),
            )
            yield from builder.build(cpus)
        _discard(work_folder)


def count_corpus_bytes(recipe: Recipe) -> int:
    """Return the size of the recipe's corpus in bytes."""
    return sum(file.size for file in list_data(recipe.data).files)


def _build_shuffled_store(
    work_folder: Path, data: Data, listing: CorpusListing, inputs: Mapping[str, Any]
) -> Manifest:
    vocabulary = _make_tokenizer(work_folder, data, listing.files)
    round_trip = _measure_round_trip(work_folder, data, listing.files)
    groups = group_files(listing.files)
    total = sum(group.size for group in groups)
    # Before the generator below runs, which makes shards as it is consumed.
    already_done = sum(group.size for group in groups if is_shard_done(group, work_folder))
    sizes = (group.size for group in tokenize_shards(groups, work_folder, vocabulary))
    _show_bytes(accumulate(sizes), total, already_done)

    left_out = LeftOut()
    left_out.update(listing.left_out)
    left_out.update(load_left_out(work_folder, range(len(groups))))
    merged = merge_shards(work_folder, len(groups), _held_out_limits(data), vocabulary, inputs)
    manifest = replace(merged, left_out=left_out.to_dict(), round_trip=round_trip)
    manifest.write(work_folder)
    return manifest


def _held_out_limits(data: Data) -> HeldOutLimits:
    return HeldOutLimits(data.held_out_fraction, data.max_held_out_tokens)


def _make_tokenizer(work_folder: Path, data: Data, files: Sequence[SourceFile]) -> Vocabulary:
    """Write the tokenizer to the work folder unless it exists; return its vocabulary."""
    tokenizer_file = work_folder / TOKENIZER_FILE
    if not tokenizer_file.is_file():
        if data.tokenizer is None:
            tokenizer = train_tokenizer(
                sample_text(files, MAX_TRAINING_CHARACTERS),
                data.vocabulary_size,
                data.num_sentinels,
                data.mode_tokens,
            )
        else:
            tokenizer = assign_special_tokens(
                load_tokenizer(data.tokenizer),
                data.num_sentinels,
                data.mode_tokens,
                data.special_tokens,
            )
        # Staged, since `save` writes in place: a resumed run would take a truncated file for a finished tokenizer.
        with staged_file(tokenizer_file) as staging:
            tokenizer.save(str(staging))

    # Read back from the file: shards must be tokenized with what is on disk, also when this run resumes.
    return build_vocabulary(load_tokenizer(tokenizer_file), data.mode_tokens)


def _measure_round_trip(
    work_folder: Path, data: Data, files: Sequence[SourceFile]
) -> dict[str, Any]:
    """Return what a given tokenizer loses of the text; refuse one that loses too much, warn of one that loses some."""
    if data.tokenizer is None:
        return {}
    tokenizer = load_tokenizer(work_folder / TOKENIZER_FILE)
    round_trip = measure_round_trip(tokenizer, sample_evenly(files, SAMPLE_CHARACTERS))
    check_round_trip(round_trip, f"data.tokenizer={data.tokenizer}")
    if round_trip.num_lost:
        # Before the text is tokenized: at the end it may be too late.
        logger.warning("data.tokenizer=%s: %s", data.tokenizer, round_trip.describe())
    return round_trip.to_dict()


def _show_bytes(done: Iterable[int], total: int, already_done: int = 0) -> None:
    """Run `done` to its end and show its byte counts as a progress bar.

    Args:
        done: Bytes done so far, rising to `total`.
        total: Bytes to do.
        already_done: Bytes that an earlier call had done, which do not count for the rate.
    """
    with show_progress(
        "tokenize", total / MEGABYTE, "MB", completed=already_done / MEGABYTE
    ) as bar:
        for count in done:
            # Finished shards are yielded as well, so a resumed count starts at zero again; the bar stays where it is
            # meanwhile.
            bar.update(max(count, already_done) / MEGABYTE)


@contextmanager
def _remove_on_user_error(work_folder: Path) -> Iterator[None]:
    """Remove the work folder if text or recipe are refused in the block; keep it after anything else, to resume."""
    try:
        yield
    # A service that fails, or processes that are killed: nothing is wrong with the finished shards.
    except ServiceError:
        raise
    except UserError:
        _discard(work_folder)
        raise


def _discard(work_folder: Path) -> None:
    """Remove a work folder; what stays is removed with the next store's `_make_work_folder`."""
    # Renamed first: neither a task that is still running nor a later attempt must find a part of it.
    remove(work_folder.rename(work_folder.with_name(f"{WORK_PREFIX}{ABANDONED}{uuid.uuid4().hex}")))


def _make_work_folder(recipe: Recipe, inputs: Mapping[str, Any]) -> Path:
    """Make the folder in which a store of these inputs is made; remove those of other inputs."""
    storage = recipe.storage.absolute()
    work_folder = storage / f"{WORK_PREFIX}{digest_inputs(inputs)}"
    for old in storage.glob(f"{WORK_PREFIX}*"):
        if old != work_folder:
            remove(old)
    _make_folder(recipe, work_folder)
    return work_folder


def _make_folder(recipe: Recipe, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"storage={recipe.storage}: not writable: {error.strerror}") from None
