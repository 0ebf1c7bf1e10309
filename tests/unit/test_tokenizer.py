from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpt_megatron.errors import ConfigError, DataError
from tpt_megatron.tokenizer import END_OF_DOCUMENT, Tokenizer, load_tokenizer, train_word_tokenizer

WORDS = ["Ann", ".", ",", "don't", "3", "<think>"]


def word_level() -> Tokenizer:
    return train_word_tokenizer((), WORDS)


def byte_level() -> Tokenizer:
    return load_tokenizer("byte", END_OF_DOCUMENT)


@given(st.text(st.characters(exclude_categories=("Cs",))))
def test_byte_level_gives_every_text_back_and_one_token_a_byte(text: str) -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) == len(text.encode())
    assert tokenizer.eod_id not in ids


@pytest.mark.parametrize("make", [word_level, byte_level])
def test_text_that_spells_the_end_of_document_is_text_also_after_loading(make: object, tmp_path: Path) -> None:
    tokenizer: Tokenizer = make()  # type: ignore[operator]
    tokenizer.save(tmp_path / "tokenizer.json")
    for same in (tokenizer, load_tokenizer(str(tmp_path), END_OF_DOCUMENT)):
        assert same.eod_id not in same.encode(f"Ann {END_OF_DOCUMENT} .")
        assert same.eod_id not in same.encode(f"Ann {END_OF_DOCUMENT} .")


@pytest.mark.parametrize("make", [word_level, byte_level])
def test_a_saved_tokenizer_is_the_same_tokenizer(make: object, tmp_path: Path) -> None:
    tokenizer: Tokenizer = make()  # type: ignore[operator]
    tokenizer.save(tmp_path / "tokenizer.json")
    again = load_tokenizer(str(tmp_path / "tokenizer.json"), END_OF_DOCUMENT)
    assert again.fingerprint == tokenizer.fingerprint
    assert (again.eod_id, again.vocabulary_size, again.unknown_id) == (tokenizer.eod_id, tokenizer.vocabulary_size, tokenizer.unknown_id)
    assert train_word_tokenizer((), ["other"]).fingerprint != tokenizer.fingerprint


def test_the_end_of_document_is_part_of_the_fingerprint() -> None:
    assert Tokenizer(word_level().backend, ".").fingerprint != word_level().fingerprint


@given(st.lists(st.sampled_from(WORDS), min_size=1))
def test_words_are_joined_by_one_space(words: list[str]) -> None:
    tokenizer = word_level()
    ids = tokenizer.encode("\n".join(words))
    assert tokenizer.decode(ids) == " ".join(words)
    assert tokenizer.decode([*ids, tokenizer.eod_id]) == " ".join([*words, END_OF_DOCUMENT])


def test_unknown_words_get_the_unknown_id_and_byte_level_knows_everything() -> None:
    assert word_level().encode("Ann Zoe") == [1, word_level().unknown_id]
    assert byte_level().unknown_id is None


@pytest.mark.parametrize("make", [word_level, byte_level])
def test_transformers_loads_the_file_and_decodes_equally(make: object, tmp_path: Path) -> None:
    tokenizer: Tokenizer = make()  # type: ignore[operator]
    tokenizer.save(tmp_path / "tokenizer.json")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import PreTrainedTokenizerFast

        theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
        text = "Ann , don't . <think> 3 ."
        assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
        ids = [*tokenizer.encode(text), tokenizer.eod_id]
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == tokenizer.decode(ids)
        assert len(theirs) == tokenizer.vocabulary_size


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_tokenizer(str(tmp_path / "none"), END_OF_DOCUMENT)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"not a tokenizer\.json"):
        load_tokenizer(str(tmp_path), END_OF_DOCUMENT)
    word_level().save(tmp_path / "tokenizer.json")
    with pytest.raises(ConfigError, match="end_of_document='</s>' is not a token"):
        load_tokenizer(str(tmp_path), "</s>")
