from __future__ import annotations

import json

import pytest

from ul2r.objective import Vocabulary

MODES = {"S2S": (1,), "NLU": (2,), "NLG": (3,)}


def test_vocabulary_survives_json() -> None:
    vocabulary = Vocabulary(size=10, eos=0, modes=MODES, sentinels=(4, 6, 5))
    assert Vocabulary.from_dict(json.loads(json.dumps(vocabulary.to_dict()))) == vocabulary


def test_special_tokens_of_one_id_are_refused() -> None:
    with pytest.raises(AssertionError, match="share an id"):
        Vocabulary(size=10, eos=0, modes=MODES, sentinels=(3, 4))


def test_id_outside_the_tokenizer_is_refused() -> None:
    with pytest.raises(AssertionError, match="outside the tokenizer"):
        Vocabulary(size=10, eos=0, modes=MODES, sentinels=(10,))
