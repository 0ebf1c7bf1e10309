from __future__ import annotations

import pydoc_data.topics
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from tpt_megatron.augment.excerpt import Excerpts, end_at_boundary, load_counting_tokenizer, start_at_boundary
from tpt_megatron.config.augment import Chunks
from tpt_megatron.errors import ConfigError, DataError

PROSE = "\n".join(pydoc_data.topics.topics[topic] for topic in ("assignment", "context-managers", "execmodel", "types"))
ALPHABET = tokenizers.pre_tokenizers.ByteLevel.alphabet()


def trained(kind: str) -> tokenizers.Tokenizer:
    """A BPE tokenizer of real prose: byte level, or one whose normaliser can make a character longer."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=None if kind == "byte" else "<unk>"))
    if kind == "byte":
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        backend.normalizer = tokenizers.normalizers.NFKC()
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1500, initial_alphabet=ALPHABET if kind == "byte" else [], special_tokens=["<unk>", "<|im_end|>"], show_progress=False
    )
    backend.train_from_iterator([PROSE], trainer)
    return backend


BACKENDS = {kind: trained(kind) for kind in ("byte", "metaspace")}

pieces = st.sampled_from(["word ", "Sentence end. ", "\n", "\n\n", "。", "水", "मि", "é", "👩‍👩‍👧", " ", "\r\n", "x" * 40, "ﷺ", "<|im_end|>", "the value of "])
texts = st.lists(st.one_of(pieces, st.text(max_size=6)), max_size=120).map("".join)


def count(backend: tokenizers.Tokenizer, text: str) -> int:
    return len(backend.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("kind", ["byte", "metaspace"])
@given(text=texts, tokens=st.integers(20, 60), before=st.integers(0, 50))
def test_chunks_are_the_document_and_keep_their_limits(kind: str, text: str, tokens: int, before: int) -> None:
    backend = BACKENDS[kind]
    excerpts = Excerpts(backend, None, Chunks(tokens=tokens, before_tokens=before)).of(text)
    assert "".join(excerpt.text for excerpt in excerpts) == text
    at = 0
    for excerpt in excerpts:
        assert (excerpt.start, text[excerpt.start : excerpt.end]) == (at, excerpt.text)
        at = excerpt.end
        assert count(backend, excerpt.text) <= tokens
        assert count(backend, excerpt.before) <= before
        assert text[: excerpt.start].endswith(excerpt.before)
    assert at == len(text)
    assert all(excerpt.text for excerpt in excerpts) or text == ""


@pytest.mark.parametrize("kind", ["byte", "metaspace"])
@given(text=texts, tokens=st.integers(20, 300))
def test_the_beginning_keeps_its_limit_and_is_whole_where_it_fits(kind: str, text: str, tokens: int) -> None:
    (excerpt,) = Excerpts(BACKENDS[kind], tokens, None).of(text)
    fits = count(BACKENDS[kind], text) <= tokens
    assert (excerpt.text == text) == fits
    assert text.startswith(excerpt.text)
    assert count(BACKENDS[kind], excerpt.text) <= tokens
    assert excerpt.before == ""


def test_an_excerpt_uses_its_limit() -> None:
    for tokens in (100, 500, 2048):
        (excerpt,) = Excerpts(BACKENDS["byte"], tokens, None).of(PROSE)
        assert count(BACKENDS["byte"], excerpt.text) >= tokens / 2
        assert excerpt.text.endswith("\n")
    chunks = Excerpts(BACKENDS["byte"], None, Chunks(tokens=128, before_tokens=64)).of(PROSE)
    assert sum(count(BACKENDS["byte"], chunk.text) for chunk in chunks) / len(chunks) > 85
    assert sum(count(BACKENDS["byte"], chunk.before) for chunk in chunks[1:]) / len(chunks) > 35


def test_of_a_long_document_only_the_beginning_is_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    excerpts = Excerpts(BACKENDS["byte"], 512, None)
    seen: list[int] = []
    offsets_of = excerpts._cutter._offsets
    monkeypatch.setattr(excerpts._cutter, "_offsets", lambda text: seen.append(len(text)) or offsets_of(text))
    excerpts.of(PROSE * 20)
    assert 0 < sum(seen) < 10_000
    seen.clear()
    excerpts.of(PROSE[:512])
    assert seen == [], "so few bytes cannot be more tokens"


def test_a_text_of_few_bytes_is_counted_where_bytes_do_not_bound_tokens() -> None:
    text = "ﷺ" * 9  # 27 bytes; each becomes 18 characters
    (excerpt,) = Excerpts(BACKENDS["metaspace"], 60, None).of(text)
    assert len(excerpt.text) < 9
    ascii_text = "7x1y2z3q4w5v6u7k"
    assert count(BACKENDS["metaspace"], ascii_text) == 17, "one for the start of a word"
    assert len(Excerpts(BACKENDS["metaspace"], 16, None).of(ascii_text)[0].text) < 16
    composed = tokenizers.Tokenizer.from_str(BACKENDS["byte"].to_str())
    composed.normalizer = tokenizers.normalizers.NFC()
    expanding = "\U0001d160" * 10  # 40 bytes, 120 after NFC
    (excerpt,) = Excerpts(composed, 40, None).of(expanding)
    assert count(composed, excerpt.text) <= 40 < count(composed, expanding)


def test_a_character_larger_than_the_limit_is_a_chunk_of_its_own() -> None:
    excerpts = Excerpts(BACKENDS["metaspace"], None, Chunks(tokens=16, before_tokens=16)).of("水ﷺ水")
    assert "".join(excerpt.text for excerpt in excerpts) == "水ﷺ水"
    assert "ﷺ" in [excerpt.text for excerpt in excerpts]


def test_without_a_limit_nothing_is_cut_and_no_tokenizer_needed() -> None:
    (excerpt,) = Excerpts(None, None, None).of(PROSE)
    assert (excerpt.text, excerpt.start, excerpt.end, excerpt.before) == (PROSE, 0, len(PROSE), "")
    with pytest.raises(ConfigError, match="a tokenizer is needed"):
        Excerpts(None, 2048, None)
    with pytest.raises(ConfigError, match="a tokenizer is needed"):
        Excerpts(None, None, Chunks())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One line of it, long.\nAnother. And mo|re text", "One line of it, long.\n"),
        ("A paragraph here.\n\nA line\nand mo|re", "A paragraph here.\n\n"),
        ("A line that ends here|\nnext", "A line that ends here"),
        ("A line that ends here\r|\nnext", "A line that ends here"),
        ("It is so. Or is| it not so", "It is so."),
        ('He said "it is so." And th|en left', 'He said "it is so."'),
        ("水は冷たい。火は熱い。空は|青い", "水は冷たい。火は熱い。"),
        ("「水は冷たい。」火は熱|い", "「水は冷たい。」"),
        ("some words without en|d here", "some words without"),
        ("it costs 3.5 dollars to|day", "it costs 3.5 dollars"),
        ("a break.\nthen a word much too far behind tha|t", "a break.\nthen a word much too far behind"),
        ("xxxxxxxxxxxxxxx|xxxxx", "xxxxxxxxxxxxxxx"),
        ("xxxxxxxxxxxxxe|\u0301xx", "xxxxxxxxxxxxx"),
        ("xxxxxxxxxxx👩\u200d|👩xx", "xxxxxxxxxxx"),
    ],
)
def test_an_end_is_moved_back_to_a_boundary(text: str, expected: str) -> None:
    at, text = text.index("|"), text.replace("|", "")
    assert text[: end_at_boundary(text, 0, at)] == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mid|dle of a line\nand the next one goes on and on", "and the next one goes on and on"),
        ("mid|dle. And the next one goes on and on", " And the next one goes on and on"),
        ("中|間。次の文はとても長く続いている", "次の文はとても長く続いている"),
        ("mid|dle of words that go on", "of words that go on"),
        ("line\n|another line\nand more", "another line\nand more"),
        ("xx|xxxxxxxxxxx", "xxxxxxxxxxx"),
        ("so mu|chofasinglewordwithaspace onlylate", "chofasinglewordwithaspace onlylate"),
    ],
)
def test_a_start_is_moved_on_to_a_boundary(text: str, expected: str) -> None:
    at, text = text.index("|"), text.replace("|", "")
    assert text[start_at_boundary(text, at, len(text)) :] == expected


def test_a_counting_tokenizer_neither_pads_nor_truncates_nor_takes_text_for_special_tokens(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_str(BACKENDS["byte"].to_str())
    backend.enable_padding(length=50)
    backend.enable_truncation(20)
    backend.save(str(tmp_path / "tokenizer.json"))
    for name in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_counting_tokenizer(str(name))
        assert count(loaded, "a") == 1
        assert count(loaded, PROSE[:1000]) > 100
        assert count(loaded, "<|im_end|>") > 1
    with pytest.raises(ConfigError, match="no such file"):
        load_counting_tokenizer(str(tmp_path / "nowhere"))
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match=r"bad\.json: not a tokenizer\.json"):
        load_counting_tokenizer(str(tmp_path / "bad.json"))
