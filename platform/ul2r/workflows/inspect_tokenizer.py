"""Where modes and sentinels go in a tokenizer, told to people."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from tokenizers import Tokenizer

from ul2r.data.special_tokens import Place, Taken, assign_special_tokens, places
from ul2r.data.tokenizer import ModeTokens, load_tokenizer, objective_tokens, vocabulary_of
from ul2r.errors import RecipeError
from ul2r.model.sizing import pad_vocabulary


def placements(
    path: Path, sentinels: int, modes: ModeTokens = "special", taken: Taken = "reserved"
) -> str:
    """What `assign_special_tokens` makes of a tokenizer, and what that means for its model's embedding.

    Args:
        path: A tokenizer.json, or a model's folder.
        sentinels: Number of sentinel tokens.
        modes: Whether modes get tokens of their own.
        taken: What modes and sentinels take.

    Returns:
        Lines for people.

    Raises:
        UserError: If the tokenizer cannot be read, or cannot hold them.
    """
    if sentinels < 1:
        raise RecipeError(f"--sentinels {sentinels}: one or more are needed")
    before = load_tokenizer(path / "tokenizer.json" if path.is_dir() else path)
    after = assign_special_tokens(before, sentinels, modes, taken)
    found = places(before, after, objective_tokens(after, sentinels, modes))
    size = vocabulary_of(after, modes).size
    lines = [f"{path}: {max(before.get_vocab().values()) + 1:,} entries, {size:,} afterwards"]
    for kind, run in groupby(found, key=lambda place: place.kind):
        lines.append(f"  {_named(list(run), before)}: {kind}")
    if path.is_dir():
        lines.append(_embedding(path, size))
    return "\n".join(lines)


def _named(run: Sequence[Place], before: Tokenizer) -> str:
    """First and last of a run with their numbers, and the text that was there."""

    def was(place: Place) -> str:
        return before.decode([place.number], skip_special_tokens=False)

    ends = [
        f"{place.text} {place.number}"
        + ("" if place.was in (None, place.text) else f" ({was(place)})")
        for place in (run[0], run[-1])
    ]
    return ends[0] if len(run) == 1 else f"{ends[0]} .. {ends[1]}, {len(run)} in all"


def _embedding(folder: Path, size: int) -> str:
    from ul2r.model.huggingface.config_json import read_architecture

    rows = read_architecture(folder).num_embeddings or 0
    padded = pad_vocabulary(max(rows, size))
    if size <= rows:
        return f"  the embedding's {rows:,} rows are enough; padded to {padded:,} in training"
    return (
        f"  the embedding's {rows:,} rows become {size:,}: {size - rows} new ones, each the mean of the others; "
        f"padded to {padded:,} in training"
    )
