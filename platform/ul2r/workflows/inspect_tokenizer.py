"""A description of where modes and sentinels go in a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from tokenizers import Tokenizer

from ul2r.data.document_tokenizer import decode_token
from ul2r.data.prepare.round_trip import describe_samples
from ul2r.data.special_tokens import (
    SpecialTokenSource,
    TokenAssignment,
    assign_special_tokens,
    list_assignments,
)
from ul2r.data.tokenizer import ModeTokens, build_vocabulary, list_objective_tokens, load_tokenizer
from ul2r.errors import RecipeError
from ul2r.model.huggingface.config_json import read_architecture
from ul2r.model.sizing import pad_vocabulary
from ul2r.paths import TOKENIZER_FILE


def describe_special_tokens(
    path: Path,
    num_sentinels: int,
    mode_tokens: ModeTokens = "special",
    source: SpecialTokenSource = "reserved",
) -> str:
    """Assign modes and sentinels to a tokenizer, and describe the result and its effect on the model's embedding.

    Args:
        path: A tokenizer.json, or a model's folder.
        num_sentinels: Number of sentinel tokens.
        mode_tokens: "special" gives modes tokens of their own, "text" writes them as text.
        source: Tokens that modes and sentinels replace.

    Returns:
        Text to print.

    Raises:
        UserError: If the tokenizer cannot be read, or has no room for them.
    """
    if num_sentinels < 1:
        raise RecipeError(f"--sentinels {num_sentinels}: must be 1 or more")

    # `assign_special_tokens` returns another tokenizer, so the two can be compared.
    before = load_tokenizer(path / TOKENIZER_FILE if path.is_dir() else path)
    after = assign_special_tokens(before, num_sentinels, mode_tokens, source)
    assigned = list_assignments(
        before, after, list_objective_tokens(after, num_sentinels, mode_tokens)
    )
    # Ids may have gaps, and the embedding has a row for each: what counts is the highest.
    old_size = max(before.get_vocab().values()) + 1
    new_size = build_vocabulary(after, mode_tokens).size

    lines = [f"{path}: {old_size:,} entries, {new_size:,} afterwards"]
    # Consecutive sentinels usually go to one kind of place: a line for each run of them.
    for origin, group in groupby(assigned, key=lambda token: token.origin):
        lines.append(f"  {_describe_group(list(group), before)}: {origin}")
    lines.append(f"  round trip: {describe_samples(after)}")
    if path.is_dir():
        lines.append(_describe_embedding(path, new_size))

    return "\n".join(lines)


def _describe_group(tokens: Sequence[TokenAssignment], before: Tokenizer) -> str:
    """Return the first and last token with their ids, and the text that had these ids before."""

    def describe(token: TokenAssignment) -> str:
        text = f"{token.text} {token.token_id}"
        if token.previous_text in (None, token.text):
            return text
        return f"{text} ({decode_token(before, token.token_id)})"

    if len(tokens) == 1:
        return describe(tokens[0])
    return f"{describe(tokens[0])} .. {describe(tokens[-1])}, {len(tokens)} in all"


def _describe_embedding(folder: Path, vocabulary_size: int) -> str:
    # Embeddings often have spare rows beyond the tokenizer's entries.
    rows = read_architecture(folder).num_embeddings or 0
    padded = pad_vocabulary(max(rows, vocabulary_size))
    if vocabulary_size <= rows:
        return f"  the embedding's {rows:,} rows are enough; padded to {padded:,} in training"

    return (
        f"  the embedding grows from {rows:,} to {vocabulary_size:,} rows: {vocabulary_size - rows} new ones, each the "
        f"mean of the others; padded to {padded:,} in training"
    )
