"""From text to a token store: train a tokenizer, have files read and tokenised in parallel, join.

Work is done in a folder beside the store, from which a shuffled store takes its place when it is whole, a streamed one
with its first chapter. Stopped and run again with the same inputs, `prepare` goes on behind the shards that were
finished.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

from ul2r.config import Data, Recipe
from ul2r.console import show_progress
from ul2r.data.prepare.documents import read_documents
from ul2r.data.prepare.merge import merge_shards
from ul2r.data.prepare.shards import group_files, shard_is_done
from ul2r.data.prepare.source_files import SourceFile, find_files
from ul2r.data.prepare.streaming import StreamingStoreBuilder, stream_groups
from ul2r.data.prepare.tokenize_shards import TOKENIZER_FILE, made_shards
from ul2r.data.special_tokens import assign_special_tokens
from ul2r.data.store.dataset import BLEND, blend_inputs, open_dataset, write_blend
from ul2r.data.store.manifest import ORDER, Manifest, digest
from ul2r.data.tokenizer import (
    load_tokenizer,
    special_tokens,
    train_tokenizer,
    vocabulary_of,
)
from ul2r.errors import CorpusError, RecipeError, UserError
from ul2r.filesystem import file_lock
from ul2r.objective import Vocabulary

TAKEN = "data.special_tokens"
SAMPLE_SIZE = 2**25
"""Characters that a tokenizer is trained on, at most."""
SAMPLE_FILES = 2**12
"""Files that they come from, at most."""
PARTIAL = "store.partial-"
"""How the names of folders begin in which stores are being made."""
MEGABYTE = 1e6


def finished(recipe: Recipe) -> Manifest | None:
    """Description of the recipe's token store, if it is there and complete, made of the same text by the same settings.

    Raises:
        CorpusError: If the text cannot be found, or a store made of something else is in the way.
    """
    manifest = begun(recipe)
    return manifest if manifest is not None and manifest.complete else None


def begun(recipe: Recipe) -> Manifest | None:
    """As `finished`, also of a streamed store that is not complete yet."""
    inputs = _inputs(recipe.data)
    store = recipe.storage_paths.store
    if not store.exists():
        return None
    manifest = open_dataset(store).manifest
    difference = _difference(manifest.inputs, inputs)
    if difference:
        raise CorpusError(
            f"{store}: {difference}: set storage to another folder, or delete {store}"
        )
    return manifest


def prepare(recipe: Recipe) -> Manifest:
    """Make the recipe's token store, on the Ray cluster that is connected; a blend of stores needs none.

    Storage and corpus must lie where every node of the cluster can reach them.

    Raises:
        CorpusError: If the text cannot be read; storage is left without a trace then, or with the chapters that a
            streamed store had.
        RecipeError: If storage cannot be written, or the vocabulary is too small for its special tokens.
    """
    if recipe.data.order == "streamed":
        for _ in _shown(stream(recipe), total_size(recipe)):
            pass
        return open_dataset(recipe.storage_paths.store).manifest
    inputs = _inputs(recipe.data)
    work = _work_folder(recipe, inputs)
    with _removed_after_a_mistake(work):
        if recipe.data.blend:
            manifest = write_blend(work, inputs)
        else:
            manifest = _make(work, recipe.data, find_files(recipe.data.corpus), inputs)
    work.replace(recipe.storage_paths.store)
    return manifest


def stream(recipe: Recipe, cpus: float | None = None) -> Generator[int]:
    """Make what is missing of the recipe's streamed store, on the Ray cluster that is connected.

    Args:
        recipe: Its corpus and storage must lie where every node of the cluster can reach them.
        cpus: CPUs that it may take; without it all.

    Yields:
        Bytes of text tokenised so far.

    Raises:
        UserError: As `prepare`.
    """
    files, inputs = find_files(recipe.data.corpus), _inputs(recipe.data)
    folder = recipe.storage_paths.store
    _make_folder(recipe, folder.parent)
    with file_lock(folder):
        if folder.exists() and Manifest.read(folder).complete:
            return
        work = _work_folder(recipe, inputs)
        with _removed_after_a_mistake(work):
            if folder.exists():
                shutil.copyfile(folder / TOKENIZER_FILE, work / TOKENIZER_FILE)
            vocabulary = _tokenizer(work, recipe.data, files)
            groups = stream_groups(files)
            store = StreamingStoreBuilder(
                folder, work, groups, recipe.data.held_out_fraction, vocabulary, inputs
            )
            yield from store.grow(cpus)
        shutil.rmtree(work)


def total_size(recipe: Recipe) -> int:
    """Bytes of the recipe's corpus."""
    return sum(file.size for file in find_files(recipe.data.corpus))


@contextmanager
def _removed_after_a_mistake(work: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        # Under another name first: a task that is still at work must not find its folder again.
        shutil.rmtree(work.replace(work.with_name(f"{PARTIAL}abandoned")))
        raise


def _make(
    work: Path, data: Data, files: Sequence[SourceFile], inputs: Mapping[str, Any]
) -> Manifest:
    vocabulary, groups = _tokenizer(work, data, files), group_files(files)
    already = sum(group.size for group in groups if shard_is_done(group, work))
    sizes = (group.size for group in made_shards(groups, work, vocabulary))
    for _ in _shown(accumulate(sizes), sum(group.size for group in groups), already):
        pass
    return merge_shards(work, len(groups), data.held_out_fraction, vocabulary, inputs)


def _tokenizer(work: Path, data: Data, files: Sequence[SourceFile]) -> Vocabulary:
    """Make the tokenizer in `work`, unless it is there."""
    tokenizer_file = work / TOKENIZER_FILE
    if not tokenizer_file.is_file():
        if data.tokenizer is None:
            tokenizer = train_tokenizer(
                _sample(files), data.vocabulary_size, data.num_sentinels, data.mode_tokens
            )
        else:
            tokenizer = assign_special_tokens(
                load_tokenizer(data.tokenizer),
                data.num_sentinels,
                data.mode_tokens,
                data.special_tokens,
            )
        beside = work / f"{TOKENIZER_FILE}.part"
        tokenizer.save(str(beside))
        beside.replace(tokenizer_file)
    return vocabulary_of(load_tokenizer(tokenizer_file), data.mode_tokens)


def _sample(files: Sequence[SourceFile]) -> Iterator[str]:
    """The beginnings of evenly spaced files, all of them where they are few and small."""
    chosen = [file for file in files[:: -(-len(files) // SAMPLE_FILES)] if not file.holds_tokens]
    fits = sum(file.size for file in chosen) <= SAMPLE_SIZE
    share = SAMPLE_SIZE if fits else SAMPLE_SIZE // len(chosen)
    taken = 0
    for file in chosen:
        end = min(taken + share, SAMPLE_SIZE)
        for text, _ in read_documents(file):
            if taken >= end:
                break
            yield text
            taken += len(text)


def _shown(done: Iterable[int], total: int, already: int = 0) -> Iterator[int]:
    """Show a bar of the bytes done of `total` while they are counted; `already` were done before."""
    with show_progress("tokenise", total / MEGABYTE, "MB", completed=already / MEGABYTE) as bar:
        for count in done:
            bar.update(max(count, already) / MEGABYTE)
            yield count


def _inputs(data: Data) -> dict[str, Any]:
    """What a store depends on, in plain JSON values."""
    if data.blend:
        return blend_inputs(data.blend)
    files = find_files(data.corpus)
    if data.tokenizer is None and any(file.holds_tokens for file in files):
        raise CorpusError(
            "data.corpus holds tokens (.bin, .idx): set data.tokenizer to the one they were made with"
        )
    taken = {} if data.special_tokens == "reserved" else {TAKEN: data.special_tokens}
    if taken and any(file.holds_tokens for file in files):
        raise CorpusError(
            f"{TAKEN}={data.special_tokens}: data.corpus holds tokens (.bin, .idx), and among them those that would "
            f"be taken: set {TAKEN} to reserved"
        )
    if data.tokenizer is None:
        special_tokens(data.num_sentinels, data.vocabulary_size, data.mode_tokens)
    else:
        load_tokenizer(data.tokenizer)
    listing = [(file.name, file.size, file.modified_ns) for file in files]
    return {
        "data.corpus": list(data.corpus),
        "data.held_out_fraction": data.held_out_fraction,
        "data.mode_tokens": data.mode_tokens,
        "data.num_sentinels": data.num_sentinels,
        "data.tokenizer": digest(data.tokenizer) if data.tokenizer else None,
        "data.vocabulary_size": None if data.tokenizer else data.vocabulary_size,
        **({ORDER: data.order} if data.order == "streamed" else {}),
        "files": len(files),
        "bytes": sum(file.size for file in files),
        "listing": hashlib.sha256(json.dumps(listing).encode()).hexdigest(),
        **taken,
    }


def _difference(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What of a store's inputs is not as the recipe has it, in words; nothing if that cannot matter."""
    if BLEND in then or BLEND in now:
        return "" if then == now else f"was made with {_blend(then)}, the recipe says {_blend(now)}"
    settings = (
        "held_out",
        "mode_tokens",
        "sentinels",
        "special_tokens",
        "tokenizer",
        "vocabulary_size",
        "order",
    )
    for key in (f"data.{setting}" for setting in settings):
        if then.get(key) != now.get(key):
            unset = {ORDER: "shuffled", TAKEN: "reserved"}.get(key)
            return (
                f"was made with {key}={then.get(key, unset)}, the recipe says {now.get(key, unset)}"
            )
    if then.get("listing") == now["listing"]:
        return ""
    if then.get("data.corpus") != now["data.corpus"]:
        return f"was made of data.corpus={then.get('data.corpus')}, the recipe says {now['data.corpus']}"
    return (
        f"files of data.corpus={now['data.corpus']} changed since it was made ({then.get('files')} files of "
        f"{then.get('bytes')} bytes then, {now['files']} of {now['bytes']} now)"
    )


def _blend(inputs: Mapping[str, Any]) -> str:
    stores = [
        f"{entry['store']} ({entry['fingerprint'][:8]}) x {entry['weight']:g}"
        for entry in inputs.get(BLEND, ())
    ]
    return f"data.blend={', '.join(stores) or 'none'}"


def _work_folder(recipe: Recipe, inputs: Mapping[str, Any]) -> Path:
    """The folder in which a store of these inputs is made; what is left of others is removed."""
    name = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16]
    storage = recipe.storage.absolute()
    work = storage / f"{PARTIAL}{name}"
    for old in storage.glob(f"{PARTIAL}*"):
        if old != work:
            shutil.rmtree(old)
    _make_folder(recipe, work)
    return work


def _make_folder(recipe: Recipe, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(
            f"storage={recipe.storage}: cannot be written: {error.strerror}"
        ) from None
