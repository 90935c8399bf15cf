"""Inputs of a token store: the settings and files that it depends on, kept in its manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ul2r.config import Data
from ul2r.config.data import MAX_HELD_OUT_TOKENS
from ul2r.data.prepare.source_files import CorpusListing, SourceFile, list_corpus
from ul2r.data.store.blend import collect_blend_inputs
from ul2r.data.store.manifest import BLEND_KEY, ORDER_KEY
from ul2r.data.tokenizer import list_special_tokens, load_tokenizer
from ul2r.errors import CorpusError
from ul2r.filesystem import sha256_of

SPECIAL_TOKENS_KEY = "data.special_tokens"
HELD_OUT_KEY = "data.held_out"
SENTINELS_KEY = "data.sentinels"
"""Two inputs keep the names that these settings had when stores were first written: the fingerprint of a streamed store
and the name of a work folder are digests of the inputs, so a new name would make another store of the same text."""
MAX_HELD_OUT_KEY = "data.max_held_out_tokens"
SPLIT_KEY = "data.held_out_by"
"""Key of the split of a streamed store, whose fingerprint is a digest of the inputs: by tokens if it is among them, by
documents in older stores."""
RECIPE_KEYS = {HELD_OUT_KEY: "data.held_out_fraction", SENTINELS_KEY: "data.num_sentinels"}
"""Current names of settings that are called otherwise among the inputs."""
TEXT_KEY = "data.text_key"
DEFAULTS = {
    ORDER_KEY: "shuffled",
    SPECIAL_TOKENS_KEY: "reserved",
    TEXT_KEY: "text",
    MAX_HELD_OUT_KEY: MAX_HELD_OUT_TOKENS,
    SPLIT_KEY: None,
}
"""Settings that are inputs only if they have other values than these."""
COMPARED_KEYS = (
    HELD_OUT_KEY,
    MAX_HELD_OUT_KEY,
    "data.mode_tokens",
    SENTINELS_KEY,
    SPECIAL_TOKENS_KEY,
    "data.tokenizer",
    "data.vocabulary_size",
    ORDER_KEY,
    TEXT_KEY,
)


def list_data(data: Data) -> CorpusListing:
    """List the files of a recipe's corpus, to be read as the recipe says.

    Raises:
        CorpusError: If the text cannot be found.
    """
    return list_corpus(data.corpus, data.text_key, data.null_text)


def collect_inputs(data: Data) -> dict[str, Any]:
    """Return the inputs of a recipe's token store as plain JSON values.

    Raises:
        CorpusError: If the text, a tokenizer or a store of a blend cannot be read, or they do not fit together.
        RecipeError: If the vocabulary is too small for its special tokens.
    """
    if data.blend:
        return collect_blend_inputs(data.blend)

    files = list_data(data).files
    holds_tokens = any(file.holds_tokens for file in files)
    if data.tokenizer is None and holds_tokens:
        raise CorpusError(
            "data.corpus has tokens (.bin, .idx): set data.tokenizer to the tokenizer they were made with"
        )
    if data.special_tokens != DEFAULTS[SPECIAL_TOKENS_KEY] and holds_tokens:
        raise CorpusError(
            f"{SPECIAL_TOKENS_KEY}={data.special_tokens}: data.corpus has tokens (.bin, .idx), which may include the "
            f"subwords to be replaced: set {SPECIAL_TOKENS_KEY} to reserved"
        )

    # Both raise if they cannot work, before any text is read.
    if data.tokenizer is None:
        list_special_tokens(data.num_sentinels, data.vocabulary_size, data.mode_tokens)
    else:
        load_tokenizer(data.tokenizer)

    # Not the contents: every start collects the inputs again, and would have to read the whole corpus for their digest.
    # `data.null_text` is no input: a store made with "refuse" has no such records, so it is what "skip" makes as well,
    # and a streamed store that was stopped by one can be continued.
    inputs: dict[str, Any] = {
        "data.corpus": list(data.corpus),
        HELD_OUT_KEY: data.held_out_fraction,
        "data.mode_tokens": data.mode_tokens,
        SENTINELS_KEY: data.num_sentinels,
        "data.tokenizer": sha256_of(data.tokenizer) if data.tokenizer else None,
        # A given tokenizer has its own size, and the setting no effect: changing it must not refuse the store.
        "data.vocabulary_size": None if data.tokenizer else data.vocabulary_size,
        ORDER_KEY: data.order,
        "files": len(files),
        "bytes": sum(file.size for file in files),
        "listing": _digest_listing(files),
        SPECIAL_TOKENS_KEY: data.special_tokens,
        TEXT_KEY: data.text_key,
        MAX_HELD_OUT_KEY: data.max_held_out_tokens,
        SPLIT_KEY: "tokens" if data.order == "streamed" else None,
    }
    # ORDER_KEY among the inputs marks a streamed store (see `Manifest.fingerprint`), so "shuffled" must be left out.
    # `...` stands for "no default": unlike None, no input equals it.
    return {key: value for key, value in inputs.items() if value != DEFAULTS.get(key, ...)}


def digest_earlier_listing(data: Data) -> str:
    """Return the input "listing" of a store that an earlier version made, see `CorpusListing.earlier_files`."""
    return _digest_listing(list_data(data).earlier_files)


def digest_inputs(inputs: Mapping[str, Any]) -> str:
    """Return a digest of the inputs that names the folder in which their store is made."""
    # In the order of `collect_inputs`: sorted, the digest would miss the folders of work that was interrupted before.
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16]


def describe_difference(
    stored: Mapping[str, Any], wanted: Mapping[str, Any], earlier_listing: str | None = None
) -> str:
    """Describe how a store's inputs differ from a recipe's; an empty string if the store can be used.

    Args:
        stored: Inputs in the store's manifest.
        wanted: Inputs of the recipe, as from `collect_inputs`.
        earlier_listing: Another listing that is as good, as from `digest_earlier_listing`.
    """
    if BLEND_KEY in stored or BLEND_KEY in wanted:
        if stored == wanted:
            return ""
        return f"made with {_describe_blend(stored)}, the recipe has {_describe_blend(wanted)}"

    for key in COMPARED_KEYS:
        if stored.get(key) != wanted.get(key):
            name = RECIPE_KEYS.get(key, key)
            old = stored.get(key, DEFAULTS.get(key))
            new = wanted.get(key, DEFAULTS.get(key))
            return f"made with {name}={old}, the recipe has {new}"

    # The listing decides, not data.corpus: another path to the same files is no difference.
    if stored.get("listing") in (wanted["listing"], earlier_listing):
        return ""
    if stored.get("data.corpus") != wanted["data.corpus"]:
        return f"made from data.corpus={stored.get('data.corpus')}, the recipe has {wanted['data.corpus']}"
    return (
        f"files of data.corpus={wanted['data.corpus']} changed since it was made ({stored.get('files')} files of "
        f"{stored.get('bytes')} bytes then, {wanted['files']} of {wanted['bytes']} now)"
    )


def _digest_listing(files: Sequence[SourceFile]) -> str:
    # Names are relative, so a folder that was moved with its times is still the same corpus.
    listing = [(file.name, file.size, file.modified_ns) for file in files]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def _describe_blend(inputs: Mapping[str, Any]) -> str:
    stores = [
        f"{entry['store']} ({entry['fingerprint'][:8]}) x {entry['weight']:g}"
        for entry in inputs.get(BLEND_KEY, ())
    ]
    return f"data.blend={', '.join(stores) or 'none'}"
