"""Shards of pairs, each from a group of files, made on any core and in any order."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from ul2r.data.document_tokenizer import DocumentTokenizer
from ul2r.data.prepare.left_out import LeftOut
from ul2r.data.prepare.pair_records import PairReader, PairText
from ul2r.data.prepare.parallel_tasks import run_tasks
from ul2r.data.prepare.shards import FileGroup, finish_shard, shard_prefix
from ul2r.data.store.pair_store import SEQUENCES_PER_PAIR
from ul2r.data.store.token_store import TokenWriter
from ul2r.data.tokenizer import load_tokenizer
from ul2r.errors import CorpusError, UserError
from ul2r.objective import Vocabulary
from ul2r.paths import TOKENIZER_FILE


@dataclass(frozen=True)
class PairSettings:
    """Settings of shards of pairs, besides their files.

    Attributes:
        folder: Folder of the shards, with the token store's tokenizer.
        vocabulary: Vocabulary of the tokenizer.
        prompt_key: Key of the prompt.
        answer_key: Key of the answer.
        tokenizer: The recipe's tokenizer.json, see `PairReader`.
    """

    folder: Path
    vocabulary: Vocabulary
    prompt_key: str
    answer_key: str
    tokenizer: Path | None


def make_pair_shards(groups: Sequence[FileGroup], settings: PairSettings) -> Iterator[FileGroup]:
    """Make the shards of groups of files, several at a time.

    Yields:
        Each group once its shard exists, in their order.

    Raises:
        CorpusError: If a record is no pair; of several, always the first.
        ServiceError: If a process is killed.
    """
    if len(groups) == 1:
        # Little enough for this process: another takes seconds to start.
        write_pair_shard(groups[0], settings)
        yield groups[0]
        return
    tasks = [(group, settings) for group in groups]
    with closing(run_tasks(_make_shard, tasks)) as errors:
        for group, error in zip(groups, errors, strict=True):
            if error:
                raise CorpusError(error)
            yield group


def _make_shard(task: tuple[FileGroup, PairSettings]) -> str:
    """Make one shard; return a user error's message, see `run_tasks`."""
    try:
        write_pair_shard(*task)
    except UserError as error:
        return str(error)
    return ""


def write_pair_shard(group: FileGroup, settings: PairSettings) -> None:
    """Encode the pairs of a group of files into a shard; its keys are digests of prompts.

    Raises:
        CorpusError: If a record is no pair.
    """
    encoder = PairEncoder(settings.folder / TOKENIZER_FILE, settings.vocabulary)
    reader = PairReader(settings.prompt_key, settings.answer_key, settings.tokenizer)
    keys = array("Q")
    text_bytes = array("q")
    left_out = LeftOut()
    with TokenWriter(
        shard_prefix(settings.folder, group.number),
        settings.vocabulary.size,
        sequences_per_document=SEQUENCES_PER_PAIR,
    ) as writer:
        for record in (record for file in group.files for record in reader.read(file)):
            if not record.pairs:
                left_out.add("chats whose answers all have weight 0", 0, record.locate)
                continue
            encoded = encoder.encode(record)
            if encoded is None:
                left_out.add("chats that spell a mode or sentinel", 0, record.locate)
                continue
            key = _digest(record.first_prompt)
            for (prompt, answer), tokens in zip(record.pairs, encoded, strict=True):
                for part in tokens:
                    writer.append(part)
                    writer.end_document()
                keys.append(key)
                text_bytes.append(len(prompt.encode()) + len(answer.encode()))
    finish_shard(settings.folder, group.number, keys, text_bytes, left_out)


def _digest(prompt: str) -> int:
    # Of the first prompt alone: pairs that share it, and the turns of a chat, are on one side of the held-out split.
    return int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=8).digest(), "little")


class PairEncoder:
    """Encodes pairs as the prompts of a served model are, and what it generates.

    A prompt begins a document, and an answer goes on in it: `LanguageModel.encode` gives the same tokens for a prompt.
    Special tokens that a text spells are plain text, but in a chat those of its template are meant, as in
    `apply_chat_template` of transformers.

    Args:
        tokenizer: The token store's tokenizer.json.
        vocabulary: Its vocabulary.
    """

    def __init__(self, tokenizer: Path, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._text = DocumentTokenizer(load_tokenizer(tokenizer))
        self._chat = load_chat_tokenizer(tokenizer)

    def encode(self, record: PairText) -> list[tuple[list[int], list[int]]] | None:
        """Return the tokens of each prompt and answer, None if they have tokens that only the objective may use.

        The answer's closing eos is left to the objective, which puts one behind every target.

        Raises:
            CorpusError: If a text has no token.
        """
        tokenizer = self._chat if record.is_chat else self._text
        encoded = []
        for prompt, answer in record.pairs:
            inputs = tokenizer.encode(prompt)
            targets = tokenizer.encode_continuation(answer)
            if targets and targets[-1] == self._vocabulary.eos:
                targets = targets[:-1]
            for name, tokens in (("prompt", inputs), ("answer", targets)):
                if not tokens:
                    raise CorpusError(
                        f"{record.locate()}: the {name} has no token: fill it in or leave the line out"
                    )
            if not self._vocabulary.non_text_ids.isdisjoint((*inputs, *targets)):
                return None
            encoded.append((inputs, targets))
        return encoded


def load_chat_tokenizer(path: Path) -> DocumentTokenizer:
    """Load a tokenizer that takes the names of special tokens for these tokens."""
    tokenizer = load_tokenizer(path)
    tokenizer.encode_special_tokens = False
    return DocumentTokenizer(tokenizer)
