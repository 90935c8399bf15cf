"""Tokenizers that lose text: the loss is measured, reported, and refused if it is large."""

from __future__ import annotations

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from ul2r.data.prepare.round_trip import (
    MAX_LOST_FRACTION,
    PIECE_CHARACTERS,
    SAMPLES,
    RoundTrip,
    check_round_trip,
    describe_samples,
    measure_round_trip,
)
from ul2r.data.tokenizer import train_tokenizer
from ul2r.errors import CorpusError

PROSE = (
    "The river sees the sea, and every child follows the snow.\n"
    "In the morning a bird sings; it is cold.\n"
) * 20


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    return train_tokenizer([PROSE], 330, 8)


@pytest.fixture(scope="module")
def uncased() -> Tokenizer:
    """A WordPiece tokenizer that lowers case, has no line breaks and knows few words."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        [PROSE], trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"])
    )
    return tokenizer


def make_metaspace_tokenizer(texts: list[str], *, collapses: bool) -> Tokenizer:
    """Return a tokenizer that puts a space before every text, as Llama 2's; if `collapses`, one like T5's."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    if collapses:
        tokenizer.normalizer = normalizers.Replace(Regex(" {2,}|\\n"), " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    alphabet = sorted(set("".join(texts)) | {"▁"})
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>"], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@pytest.mark.parametrize("text", [*SAMPLES.values(), PROSE, "", "\n\n", " a", "x" * 5000])
def test_byte_level_tokenizer_loses_nothing(byte_level: Tokenizer, text: str) -> None:
    round_trip = measure_round_trip(byte_level, [text])
    assert round_trip == RoundTrip(len(text), 0)
    assert round_trip.describe() == ""
    assert round_trip.to_dict() == {}


def test_space_before_a_text_is_no_loss() -> None:
    tokenizer = make_metaspace_tokenizer([PROSE], collapses=False)
    assert measure_round_trip(tokenizer, [PROSE] * 3).num_lost == 0


def test_lost_line_breaks_are_counted() -> None:
    tokenizer = make_metaspace_tokenizer([PROSE], collapses=True)
    round_trip = measure_round_trip(tokenizer, [PROSE])
    assert round_trip.num_lost == PROSE.count("\n")
    assert "\n" not in round_trip.describe()


def test_lost_capitals_are_counted(byte_level: Tokenizer) -> None:
    tokenizer = Tokenizer.from_str(byte_level.to_str())
    tokenizer.normalizer = normalizers.Lowercase()
    round_trip = measure_round_trip(tokenizer, [PROSE])
    assert round_trip.num_lost == sum(character.isupper() for character in PROSE)
    assert round_trip.example[0][0] == "T"
    assert round_trip.example[1][0] == "t"


def test_text_is_measured_up_to_the_limit(byte_level: Tokenizer) -> None:
    texts = ["a" * 1000] * 10
    assert measure_round_trip(byte_level, texts, max_characters=2500).num_characters == 3000


def test_uncased_tokenizer_is_told_of_and_one_without_the_alphabet_refused(
    uncased: Tokenizer,
) -> None:
    english = measure_round_trip(uncased, [PROSE])
    assert 0 < english.lost_fraction <= MAX_LOST_FRACTION
    check_round_trip(english, "data.tokenizer=t.json")

    for text in (SAMPLES["code"], SAMPLES["other scripts"]):
        with pytest.raises(CorpusError) as caught:
            check_round_trip(measure_round_trip(uncased, [text]), "data.tokenizer=t.json")
        message = str(caught.value)
        assert message.startswith("data.tokenizer=t.json: this tokenizer cannot hold the text")
        assert "unset data.tokenizer to train one" in message
        assert "\n" not in message


def test_loss_is_kept_as_json(uncased: Tokenizer) -> None:
    round_trip = measure_round_trip(uncased, [PROSE])
    assert RoundTrip.from_dict(round_trip.to_dict()) == round_trip
    assert RoundTrip.from_dict({}).describe() == ""


def test_samples_say_what_is_lost_where(byte_level: Tokenizer, uncased: Tokenizer) -> None:
    assert describe_samples(byte_level).startswith("no character is lost of samples of English,")
    text = describe_samples(uncased)
    assert text.startswith("characters are lost of samples, ")
    assert "% of other scripts" in text
    assert "\n" not in text


def test_pieces_cover_text_without_white_space(byte_level: Tokenizer) -> None:
    text = "ab" * (3 * PIECE_CHARACTERS) + "\n" * 500 + " c"
    assert measure_round_trip(byte_level, [text]) == RoundTrip(len(text), 0)
