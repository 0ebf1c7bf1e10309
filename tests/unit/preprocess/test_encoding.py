"""Engines: the same ids from all of them, by piece or whole, or a word about it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from tpt_megatron.errors import ConfigError, DataError, MachineError
from tpt_megatron.preprocess import encoding
from tpt_megatron.preprocess.encoding import Encoder, choose_engine
from tpt_megatron.tokenizer import END_OF_DOCUMENT, Tokenizer, TokenizerLike, load_tokenizer, train_word_tokenizer

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@cache
def library() -> tuple[str, ...]:
    """Real text: the source of Python's json and logging packages."""
    folders = (Path(json.__file__).parent, Path(logging.__file__).parent)
    return tuple(path.read_text(encoding="utf-8") for folder in folders for path in sorted(folder.glob("*.py")))


def byte_level_bpe(pattern: str | None, normalizer: Any = None) -> Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    backend.pre_tokenizer = byte_level if pattern is None else pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])
    backend.decoder = decoders.ByteLevel()
    special = [END_OF_DOCUMENT, "<|other|>"]
    trainer = trainers.BpeTrainer(vocab_size=3000, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    backend.train_from_iterator(library(), trainer)
    if normalizer is not None:
        backend.normalizer = normalizer
    return Tokenizer(backend, END_OF_DOCUMENT)


@cache
def sentencepiece_model(**options: Any) -> bytes:
    """Train a model, by default one that leaves the text as it is and its beginning as any other place."""
    import io

    import sentencepiece

    out = io.BytesIO()
    as_is = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "add_dummy_prefix": False}
    lines = iter([line for text in library() for line in text.splitlines() if line.strip()])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=out, vocab_size=900, model_type="bpe", byte_fallback=True, minloglevel=2,
        user_defined_symbols=["<think>"], **(as_is | options),
    )  # fmt: skip
    return out.getvalue()


@cache
def kind(name: str) -> TokenizerLike:
    match name:
        case "gpt2":
            return byte_level_bpe(None)
        case "llama3":
            return byte_level_bpe(LLAMA3)
        case "normalized":
            return byte_level_bpe(LLAMA3, normalizers.NFC())
        case "words":
            return train_word_tokenizer(library())
        case "unigram":
            backend = tokenizers.Tokenizer(models.Unigram())
            backend.pre_tokenizer = pre_tokenizers.Metaspace()
            backend.decoder = decoders.Metaspace()
            trainer = trainers.UnigramTrainer(vocab_size=500, special_tokens=["<unk>", END_OF_DOCUMENT], unk_token="<unk>", show_progress=False)
            backend.train_from_iterator(library(), trainer)
            return Tokenizer(backend, END_OF_DOCUMENT)
    from tpt_megatron.tokenizer import SentencePieceTokenizer

    options: dict[str, Any] = {
        "sentencepiece": {},
        "sentencepiece, prefix": {"add_dummy_prefix": True},
        "sentencepiece, normalizing": {"add_dummy_prefix": True, "remove_extra_whitespaces": True, "normalization_rule_name": "nmt_nfkc"},
    }[name]
    return SentencePieceTokenizer(sentencepiece_model(**options), "</s>", "test.model")


KINDS = ("gpt2", "llama3", "normalized", "words", "unigram", "sentencepiece", "sentencepiece, prefix", "sentencepiece, normalizing")
texts = st.text(st.one_of(st.sampled_from("ab \n\r\t01'.é中😀"), st.characters(exclude_categories=("Cs",))), max_size=80)
spelling = st.builds(lambda a, b, special: f"{a}{special}{b}", texts, texts, st.sampled_from([END_OF_DOCUMENT, "<|other|>", "<think>", "</s>"]))


def reference(name: str, text: str) -> list[int]:
    return kind(name).encode(text)


@cache
def best(name: str) -> Encoder:
    return choose_engine(kind(name), "auto", library())


@pytest.mark.parametrize(("name", "engine"), [("gpt2", "fastokens"), ("llama3", "fastokens"), ("words", "tokenizers"), ("sentencepiece", "sentencepiece")])
def test_the_fast_engine_is_taken_where_it_can_do_the_tokenizer(name: str, engine: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tpt_megatron"):
        assert choose_engine(kind(name), "auto", library()).engine == engine
    assert ("fastokens cannot do this tokenizer" in caplog.text) == (name == "words")


@pytest.mark.parametrize("name", KINDS)
@hypothesis_settings(max_examples=60)
@given(batch=st.lists(texts | spelling, max_size=5))
def test_ids_are_the_references_and_special_tokens_text_is_text(name: str, batch: list[str]) -> None:
    ids, bounds = best(name).encode(batch)
    assert bounds[0] == 0 and bounds[-1] == len(ids) and len(bounds) == len(batch) + 1
    assert [ids[begin:end].tolist() for begin, end in pairwise(bounds)] == [reference(name, text) for text in batch]
    if name != "unigram":  # has the token among its pieces: such texts are set aside, see test_preprocess_runner.py
        assert kind(name).eod_id not in ids


def test_real_text_is_the_same_in_both_engines() -> None:
    for name in ("gpt2", "llama3"):
        fast, slow = (Encoder(kind(name), engine).encode(library()) for engine in ("fastokens", "tokenizers"))  # type: ignore[arg-type]
        assert np.array_equal(fast[0], slow[0]) and np.array_equal(fast[1], slow[1])
        assert len(fast[0]) > 50_000


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    "make",
    [
        lambda: "".join(library())[:40_000],
        lambda: "0123456789" * 600,
        lambda: "word" * 1500,
        lambda: "中文字符没有空格" * 500,
        lambda: "😀é" * 1500,
        lambda: "\n" * 4000,
        lambda: "a b\n\n c  \r\n" * 500,
        lambda: "x\n" + " " * 6000,
    ],
    ids=["code", "digits", "one word", "chinese", "emoji", "line ends", "white space", "blanks"],
)
def test_a_long_text_in_windows_has_the_ids_that_it_has_as_a_whole(name: str, make: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "WINDOW", dict.fromkeys(encoding.WINDOW, 700))
    monkeypatch.setattr(encoding, "CONTEXT", 60)
    text, encoder = make(), best(name)
    for size in (97, 5000):
        parts = list(encoder.encode_long(text[begin : begin + size] for begin in range(0, len(text), size)))
        assert "".join(part for part, _ in parts) == text
        assert np.concatenate([ids for _, ids in parts]).tolist() == reference(name, text)
    if name in ("gpt2", "llama3") and "word" not in text:
        assert len(parts) > 4, "no window was cut"


def test_a_text_that_cannot_be_cut_takes_time_by_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """A word-level tokenizer has one token for a text without white space, wherever a window ends."""
    monkeypatch.setattr(encoding, "WINDOW", dict.fromkeys(encoding.WINDOW, 100))
    monkeypatch.setattr(encoding, "CONTEXT", 10)
    original, encoded = encoding._HuggingFace.encode, []

    def encode(self: encoding._HuggingFace, batch: Any) -> encoding.Batch:
        encoded.append(sum(map(len, batch)))
        return original(self, batch)

    monkeypatch.setattr(encoding._HuggingFace, "encode", encode)
    text, encoder = "w" * 20_000, Encoder(kind("words"), "tokenizers")
    [(part, ids)] = encoder.encode_long(text[begin : begin + 50] for begin in range(0, len(text), 50))
    assert (part, ids.tolist()) == (text, reference("words", text))
    assert sum(encoded) < 40 * len(text)


@hypothesis_settings(max_examples=40)
@given(text=st.lists(texts, max_size=30).map("".join), size=st.integers(1, 50), name=st.sampled_from(["gpt2", "llama3"]))
def test_any_text_in_windows_has_the_ids_that_it_has_as_a_whole(text: str, size: int, name: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "WINDOW", dict.fromkeys(encoding.WINDOW, 100))
        patch.setattr(encoding, "CONTEXT", 40)
        parts = [ids for _, ids in best(name).encode_long(text[begin : begin + size] for begin in range(0, len(text), size))]
    assert [number for ids in parts for number in ids.tolist()] == reference(name, text)


@pytest.mark.parametrize("name", KINDS)
@hypothesis_settings(max_examples=60)
@given(text=texts)
def test_token_ends_count_whole_characters(name: str, text: str) -> None:
    encoder = best(name)
    ids = encoder.encode([text])[0]
    ends = encoder.token_ends(text, ids)
    assert len(ends) == len(ids)
    assert (np.diff(ends) >= 0).all() and (ends >= 0).all()
    if len(ends):
        assert ends[-1] == len(text)
    if name in ("gpt2", "llama3"):
        decoder = kind(name)
        for number, end in enumerate(ends.tolist(), 1):
            assert decoder.decode(ids[:number].tolist()).rstrip("\ufffd") == text[:end].rstrip("\ufffd")


def test_hugging_face_is_given_a_bounded_amount_of_text_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "TEXT_AT_ONCE", 1000)
    batch = [library()[0][begin : begin + 300] for begin in range(0, 6000, 300)]
    encoder, given = Encoder(kind("gpt2"), "tokenizers"), []
    backend = encoder._encode._backend  # type: ignore[union-attr]

    class Watched:
        def encode_batch_fast(self, texts: list[str], **options: Any) -> Any:
            given.append(sum(map(len, texts)))
            return backend.encode_batch_fast(texts, **options)

    monkeypatch.setattr(encoder._encode, "_backend", Watched())
    ids, bounds = encoder.encode(batch)
    assert [ids[begin:end].tolist() for begin, end in pairwise(bounds)] == [reference("gpt2", text) for text in batch]
    assert max(given) == 1200, "the text that reaches the bound is the last one"


def differing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have fastokens give another id for each text that holds "json": nothing real makes it differ on demand."""
    original = encoding._Fastokens.encode

    def encode(self: encoding._Fastokens, batch: Any) -> encoding.Batch:
        ids, bounds = original(self, batch)
        ids = ids.copy()
        for number, text in enumerate(batch):
            if "json" in text:
                ids[bounds[number] + 2] ^= 1
        return ids, bounds

    monkeypatch.setattr(encoding._Fastokens, "encode", encode)


def test_a_difference_on_the_sample_falls_back_with_a_warning_or_is_refused_on_request(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    differing(monkeypatch)
    sample = ["no such word here", "import json from there"]
    assert choose_engine(kind("gpt2"), "auto", sample[:1]).engine == "fastokens"
    assert choose_engine(kind("gpt2"), "auto", sample).engine == "tokenizers"
    assert "differs from Hugging Face's tokenizers on a sample of the input: text 1 ('import json from there'...) from token 2 on" in caplog.text
    with pytest.raises(ConfigError, match="differs from Hugging Face's tokenizers on a sample of the input: text 1"):
        choose_engine(kind("gpt2"), "fastokens", sample)


def test_with_verify_full_a_difference_is_found_wherever_it_is(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    differing(monkeypatch)
    encoder = choose_engine(kind("gpt2"), "auto", ["a sample"], verify_all=True)
    assert encoder.engine == "fastokens"
    encoder.encode(["fine"])
    assert encoder.engine == "fastokens"
    ids, _ = encoder.encode(["fine", "import json from there"])
    assert ids.tolist() == reference("gpt2", "fine") + reference("gpt2", "import json from there")
    assert encoder.engine == "tokenizers"
    assert "text 1 ('import json from there'...) from token 2 on" in caplog.text
    long = list(choose_engine(kind("gpt2"), "auto", ["a sample"], verify_all=True).encode_long(["import json ", "from there"]))
    assert long[0][1].tolist() == reference("gpt2", "import json from there")


def test_what_was_asked_for_and_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match="engine=fastokens cannot do this tokenizer"):
        choose_engine(kind("words"), "fastokens", [])
    assert choose_engine(kind("gpt2"), "tokenizers", []).engine == "tokenizers"
    monkeypatch.setitem(__import__("sys").modules, "fastokens", None)
    with pytest.raises(MachineError, match="engine=fastokens is not installed"):
        choose_engine(kind("gpt2"), "fastokens", [])
    with caplog.at_level(logging.INFO, "tpt_megatron"):
        assert choose_engine(kind("gpt2"), "auto", []).engine == "tokenizers"
    assert "fastokens is not installed" in caplog.text


def test_a_sentencepiece_model_is_loaded_from_a_file_or_folder_and_saved(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    for name in (tmp_path, tmp_path / "tokenizer.model"):
        tokenizer = load_tokenizer(str(name), "</s>")
        assert tokenizer.file_name == "tokenizer.model"
        assert tokenizer.vocabulary_size == 900
        assert tokenizer.unknown_id is None
        assert tokenizer.eod_id == 2
        assert tokenizer.decode([*tokenizer.encode("import json é中"), 2]) == "import json é中</s>"
        assert 2 not in tokenizer.encode("a </s> b")
        assert tokenizer.added_token_id("<think>") is not None
        assert tokenizer.added_token_id("import") is None
    assert load_tokenizer(str(tmp_path), "<s>").fingerprint != tokenizer.fingerprint
    tokenizer.save(tmp_path / "copy.model")
    assert load_tokenizer(str(tmp_path / "copy.model"), "</s>").fingerprint == tokenizer.fingerprint
    with pytest.raises(ConfigError, match=r"end_of_document='<\|endoftext\|>' is not a control symbol"):
        load_tokenizer(str(tmp_path), END_OF_DOCUMENT)
    (tmp_path / "bad.model").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"bad\.model: not a SentencePiece model"):
        load_tokenizer(str(tmp_path / "bad.model"), "</s>")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "sentencepiece", None)
        with pytest.raises(MachineError, match=r"tpt-megatron\[sentencepiece\]"):
            load_tokenizer(str(tmp_path), "</s>")
    train_word_tokenizer(["a"]).save(tmp_path / "tokenizer.json")
    assert load_tokenizer(str(tmp_path), END_OF_DOCUMENT).file_name == "tokenizer.json"


def test_of_the_bytes_of_one_character_only_the_last_covers_it() -> None:
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"<unk>": 256, "</s>": 257, "a": 258, "▁": 259, "b": 260}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    hugging_face = Encoder(Tokenizer(backend, "</s>"), "tokenizers")
    for encoder in (best("sentencepiece"), hugging_face):
        ids = encoder.encode(["a 日b"])[0]
        assert len(ids) == 6
        assert encoder.token_ends("a 日b", ids).tolist() == [1, 2, 2, 2, 3, 4]
