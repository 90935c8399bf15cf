"""Long documents: joined, the tokens of their chunks are those of the whole document encoded at once."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from tokenizers import Regex, pre_tokenizers

from ul2r.data.document_tokenizer import DocumentTokenizer
from ul2r.data.prepare import long_documents
from ul2r.data.prepare.documents import CHUNK_SIZE, split_into_chunks
from ul2r.data.prepare.long_documents import ChunkTokenizer, find_cut
from ul2r.data.tokenizer import encode
from ul2r.testing.tokenizers import KINDS, LLAMA_3_SPLIT

WORDS = [
    *(
        "word",
        "def f(x):",
        "It's",
        "isn't",
        "'s",
        "12345",
        "12 345",
        "=>",
        "););\n",
        "(",
        ")",
        "🙂",
        "文字",
    ),
    *("\n", "\n\n", "\r\n", "    ", "  ", " ", "\t", " \n  \n x", "*" * 30, " " * 30),
]
"""Words and white space in every order, among them all that tokenizers' regular expressions look ahead for."""


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> DocumentTokenizer:
    return DocumentTokenizer(KINDS[request.param]())


@pytest.fixture
def small_window(monkeypatch: pytest.MonkeyPatch) -> int:
    """Width of the window in which a place to cut is looked for."""
    width = 200
    monkeypatch.setattr(long_documents, "CUT_WINDOW", width)
    monkeypatch.setattr(long_documents, "CUT_MARGIN", 20)
    return width


def make_text(generator: random.Random, num_words: int) -> str:
    words = [generator.choice(WORDS) + generator.choice(["", " "]) for _ in range(num_words)]
    # The sum of a Unigram's scores is the same for "\n" "\n\n" and "\n\n" "\n": nothing says which of them comes first.
    text = "".join(words)
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text


def encode_in_chunks(tokenizer: DocumentTokenizer, chunks: list[str]) -> list[int]:
    chunk_tokenizer = ChunkTokenizer(tokenizer)
    ids: list[int] = []
    for number, chunk in enumerate(chunks, start=1):
        ids += chunk_tokenizer.encode(chunk, ends_document=number == len(chunks)).tolist()
    return ids


@pytest.mark.usefixtures("small_window")
def test_chunks_have_the_tokens_of_the_whole(tokenizer: DocumentTokenizer) -> None:
    generator = random.Random(1)

    for _ in range(20):
        text = make_text(generator, 300)
        ends = sorted(generator.sample(range(1, len(text)), 5))
        bounds = [0, *ends, len(text)]
        chunks = [text[begin:end] for begin, end in pairwise(bounds)]

        expected = encode(tokenizer.tokenizer, text).tolist()

        assert encode_in_chunks(tokenizer, chunks) == expected


@pytest.mark.parametrize("kind", ["byte-level", "Llama 3", "Llama 2", "BPE, always"])
def test_a_long_document_as_it_is_read(kind: str) -> None:
    tokenizer = DocumentTokenizer(KINDS[kind]())
    text = "def f(x):\n    return x\n\n    # The sea, it's 12345 miles.\n" * 2500
    chunks = [chunk.text for chunk in split_into_chunks([text])]
    assert len(chunks) == 3

    assert encode_in_chunks(tokenizer, chunks) == encode(tokenizer.tokenizer, text).tolist()


def test_a_document_of_one_chunk_is_encoded_as_ever(tokenizer: DocumentTokenizer) -> None:
    text = "The sea.\n" * 4000

    chunk_tokenizer = ChunkTokenizer(tokenizer)

    for _ in range(2):
        ids = chunk_tokenizer.encode(text, ends_document=True).tolist()
        assert ids == encode(tokenizer.tokenizer, text).tolist()


@pytest.mark.parametrize("text", ["x" * 500, "文" * 500, "0" * 500])
def test_little_is_held_back_even_without_white_space(small_window: int, text: str) -> None:
    for kind in ("byte-level", "Llama 3", "Llama 2"):
        tokenizer = DocumentTokenizer(KINDS[kind]())
        cut = find_cut(tokenizer, text)

        assert len(text) - small_window < cut < len(text), kind
        assert encode_in_chunks(tokenizer, [text, text]) == tokenizer.encode(text * 2), kind


def test_a_document_without_a_place_to_cut_is_kept_whole() -> None:
    """T5's kind has no token for white space, so there is nothing to cut between."""
    tokenizer = DocumentTokenizer(KINDS["T5"]())
    blank = "\n" * CHUNK_SIZE

    assert find_cut(tokenizer, blank) == 0
    assert encode_in_chunks(tokenizer, [blank, "the sea"]) == tokenizer.encode("the sea")
    assert encode_in_chunks(tokenizer, [blank, blank]) == []


@pytest.mark.usefixtures("small_window")
def test_held_back_text_is_not_searched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gigabyte of blanks would be copied for each chunk."""
    sizes = []

    def find_and_note(tokenizer: DocumentTokenizer, text: str) -> int:
        sizes.append(len(text))
        return find_cut(tokenizer, text)

    monkeypatch.setattr(long_documents, "find_cut", find_and_note)
    tokenizer = DocumentTokenizer(KINDS["T5"]())
    chunks = ["the sea ", *[" " * 150] * 20, "was calm ", *[" " * 150] * 20, "the sea"]

    assert encode_in_chunks(tokenizer, chunks) == tokenizer.encode("".join(chunks))
    assert len(sizes) == len(chunks) - 1
    assert max(sizes) <= long_documents.CUT_WINDOW


def make_splitting(numbers: str) -> DocumentTokenizer:
    """Return Llama 3's kind with another pattern for numbers."""
    tokenizer = KINDS["Llama 3"]()
    pattern = LLAMA_3_SPLIT.replace(r"\p{N}{1,3}", numbers)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return DocumentTokenizer(tokenizer)


@pytest.mark.parametrize(
    "numbers",
    [
        pytest.param(r"\p{N}{1,3}", id="groups from the first digit on"),
        pytest.param(r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))", id="groups up to the last digit"),
    ],
)
@pytest.mark.usefixtures("small_window")
def test_numbers_are_not_cut_if_there_is_anything_else(numbers: str) -> None:
    tokenizer = make_splitting(numbers)
    generator = random.Random(2)

    for _ in range(20):
        text = ""
        for separator in generator.choices([" ", ",", "a", "\n"], [1, 6, 2, 1], k=100):
            # Tokens of several digits, so that it shows how they are divided.
            text += "".join(generator.choices("12345", k=generator.randint(1, 120))) + separator
        ends = sorted(generator.sample(range(1, len(text)), 20))
        bounds = [0, *ends, len(text)]
        chunks = [text[begin:end] for begin, end in pairwise(bounds)]

        assert encode_in_chunks(tokenizer, chunks) == encode(tokenizer.tokenizer, text).tolist()
