"""Parts of a document against the whole: tokens where it is cut at their boundaries, and text of decoded parts.

The oracle encodes and decodes the whole at once, with every kind of tokenizer that published models have.
"""

from __future__ import annotations

import pytest

from ul2r.data.document_tokenizer import DocumentTokenizer, decode_continuation
from ul2r.data.tokenizer import encode
from ul2r.testing.tokenizers import KINDS, WITHOUT_WHITE_SPACE

TEXT = (
    "def area(width, height):\n    return width*height => 12345\n\n"
    "It's calm, isn't it?  The café 🙂 sees 文字 the sea. (naïve)\n"
)
DRAGON = "\N{DRAGON}"
"""A character that no tokenizer was trained on: tokens of its bytes."""
PREFIXED = [kind for kind in KINDS if not any(name in kind for name in ("never", "Llama 3"))]
PREFIXED.remove("byte-level")
PREFIXED.remove("WordPiece")


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def tokenizer(kind: str) -> DocumentTokenizer:
    return DocumentTokenizer(KINDS[kind]())


def list_cuts(document: DocumentTokenizer, kind: str) -> list[tuple[int, int]]:
    """Return the boundaries of the text's tokens as (tokens before, characters before)."""
    encoding = document.tokenizer.encode(TEXT, add_special_tokens=False)
    cuts = []
    for i in range(1, len(encoding.ids)):
        # Behind an added token the text begins anew, and a part does not tell what it is behind.
        if encoding.ids[i - 1] in document.added_text_ids:
            continue
        end, (begin, next_end) = encoding.offsets[i - 1][1], encoding.offsets[i]
        # No token begins or ends within a character; the prefix is a token without characters, or shares one.
        is_clean = end <= begin < next_end
        # Without white space in its tokens, a tokenizer takes any beginning of a part for that of a word.
        if is_clean and (kind not in WITHOUT_WHITE_SPACE or TEXT[end].isspace()):
            cuts.append((i, end))
    return cuts


def test_tokens_of_parts_join_to_those_of_the_whole(
    tokenizer: DocumentTokenizer, kind: str
) -> None:
    whole = encode(tokenizer.tokenizer, TEXT).tolist()
    cuts = list_cuts(tokenizer, kind)
    assert len(cuts) > 15

    wrong = []
    for tokens, characters in cuts:
        if tokenizer.encode_continuation(TEXT[characters:]) != whole[tokens:]:
            wrong.append((TEXT[:characters], TEXT[characters:]))
        # White space at the end of a text is divided in another way than before a word.
        before = TEXT[:characters]
        if not before[-1].isspace() and tokenizer.encode(before) != whole[:tokens]:
            wrong.append((before, ""))
    assert not wrong


def test_texts_of_decoded_parts_join_to_that_of_the_whole(
    tokenizer: DocumentTokenizer, kind: str
) -> None:
    ids = encode(tokenizer.tokenizer, TEXT).tolist()
    whole = tokenizer.tokenizer.decode(ids, skip_special_tokens=False)

    for tokens, _ in [(0, 0), *list_cuts(tokenizer, kind), (len(ids), 0)]:
        first = tokenizer.decode_continuation([], ids[:tokens])
        assert first == tokenizer.tokenizer.decode(ids[:tokens], skip_special_tokens=False)
        assert first + tokenizer.decode_continuation(ids[:tokens], ids[tokens:]) == whole


@pytest.mark.parametrize("kind", PREFIXED, scope="module")
def test_tokenizers_with_a_prefix_need_another_encoding_for_continuations(
    tokenizer: DocumentTokenizer,
) -> None:
    """Otherwise the tests above would pass without any of this."""
    assert tokenizer.encode_continuation("sea") != tokenizer.encode("sea")


@pytest.mark.parametrize("kind", ["Llama 2", "BPE, always", "Unigram, first", "T5"], scope="module")
def test_the_text_behind_a_slot_has_no_space_that_it_lacks(tokenizer: DocumentTokenizer) -> None:
    text = tokenizer.tokenizer
    behind = tokenizer.encode_continuation("): return")
    whole = tokenizer.encode("f(a): return")

    assert text.id_to_token(behind[0]) == ")"
    assert whole[-len(behind) :] == behind


def test_nothing_has_no_tokens(tokenizer: DocumentTokenizer) -> None:
    assert tokenizer.encode_continuation("") == []
    assert tokenizer.decode_continuation([], []) == ""


def test_a_tokenizer_without_a_prefix_is_not_copied() -> None:
    for kind in ("byte-level", "Llama 3", "BPE, never", "WordPiece"):
        assert DocumentTokenizer(KINDS[kind]())._inside is None, kind


@pytest.mark.parametrize("kind", ["byte-level", "Llama 2"], scope="module")
def test_a_character_cut_in_two_is_completed_by_the_second_part(
    tokenizer: DocumentTokenizer,
) -> None:
    ids = tokenizer.encode(f"sea{DRAGON} calm")
    dragon = tokenizer.encode_continuation(DRAGON)
    size = len(dragon)
    assert size > 2, "this test needs a character of several tokens"
    begin = next(i for i in range(len(ids)) if ids[i : i + size] == dragon)

    for cut in range(begin + 1, begin + size):
        assert tokenizer.decode_continuation(ids[:cut], ids[cut:]) == f"{DRAGON} calm"


def test_an_incomplete_character_changes_no_text_before_it() -> None:
    """In a row of byte tokens one that is invalid spoils the whole row (tokenizers' `ByteFallback`)."""
    tokenizer = KINDS["Llama 2"]()
    before = encode(tokenizer, f"sea{DRAGON}").tolist()
    first_byte = before[-4]

    assert decode_continuation(tokenizer, before, [first_byte]) == "\N{REPLACEMENT CHARACTER}"


def test_a_long_context_gives_the_same_text_as_its_end(tokenizer: DocumentTokenizer) -> None:
    before = tokenizer.encode("the sea sees the river, " * 50)
    ids = tokenizer.encode_continuation(" and the sea")

    whole = tokenizer.tokenizer.decode([*before, *ids], skip_special_tokens=False)
    assert whole.endswith("and the sea")
    assert tokenizer.decode_continuation(before, ids) in {" and the sea", "and the sea"}
