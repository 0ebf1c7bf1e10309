"""One face over tokenizers: a Hugging Face `tokenizer.json` (or its folder), SentencePiece, byte level, or words of a closed vocabulary.

All but SentencePiece are held as a `tokenizers.Tokenizer`, so that what was trained on exports as a `tokenizer.json`; a
SentencePiece model stays the file that it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol

import orjson
import tokenizers

from tpt_megatron.errors import ConfigError, DataError, MachineError
from tpt_megatron.files import open_atomic

BYTE_LEVEL = "byte"
END_OF_DOCUMENT = "<|endoftext|>"
TOKENIZER_JSON, SENTENCEPIECE_MODEL = "tokenizer.json", "tokenizer.model"
_HINT = "give 'byte', a tokenizer.json, a SentencePiece .model, or a folder that holds one"


class TokenizerLike(Protocol):
    """Text to token ids and back, with a fingerprint that says whether two tokenizers are the same.

    end_of_document  the token that closes every document, one token of the vocabulary; eod_id: its id
    file_name        of what `to_bytes` gives: tokenizer.json or tokenizer.model
    """

    end_of_document: str
    eod_id: int
    file_name: str

    @property
    def vocabulary_size(self) -> int:
        """Number of ids, added tokens included: one more than the largest id."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer's definition and its end-of-document token, 16 hex digits."""

    @property
    def unknown_id(self) -> int | None:
        """Id that stands for what the vocabulary cannot express; None where every text can be expressed."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without any special token added around it. Text that spells a special token is text."""

    def ends(self, text: str) -> tuple[list[int], list[int]]:
        """Return the ids of `text` as `encode` does, and for each the character of `text` that it ends before."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, special tokens included."""

    def added_token_id(self, text: str) -> int | None:
        """Return the id of the added or control token that is spelled `text`; None where there is none."""

    def to_bytes(self) -> bytes:
        """Return the file that defines the tokenizer."""

    def save(self, path: Path) -> None:
        """Write that file."""


class Tokenizer:
    """A tokenizer of Hugging Face's library; see `TokenizerLike`."""

    file_name = TOKENIZER_JSON

    def __init__(self, backend: tokenizers.Tokenizer, end_of_document: str) -> None:
        self.backend = backend
        backend.no_padding()
        backend.no_truncation()
        # Text that spells a special token, in a document, is text: it must not end the document. Not kept in tokenizer.json.
        backend.encode_special_tokens = True
        eod = backend.token_to_id(end_of_document)
        if eod is None:
            raise ConfigError(f"end_of_document={end_of_document!r} is not a token of this tokenizer; name one that is, for example </s> or <|endoftext|>")
        self.end_of_document = end_of_document
        self.eod_id: int = eod

    @cached_property
    def definition(self) -> str:
        """The tokenizer as JSON in one line."""
        return str(self.backend.to_str())

    @cached_property
    def vocabulary_size(self) -> int:
        """Number of ids, added tokens included: one more than the largest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the definition and the end-of-document token, 16 hex digits."""
        return hashlib.sha256(f"{self.definition}\n{self.end_of_document}".encode()).hexdigest()[:16]

    @cached_property
    def unknown_id(self) -> int | None:
        """Id that stands for what the vocabulary cannot express; None where every text can be expressed."""
        model = orjson.loads(self.definition)["model"]
        if model.get("unk_id") is not None:  # Unigram
            return int(model["unk_id"])
        return None if model.get("unk_token") is None else self.backend.token_to_id(model["unk_token"])

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without any special token added around it."""
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def ends(self, text: str) -> tuple[list[int], list[int]]:
        """Return the ids of `text`, and for each the character that it ends before."""
        encoding = self.backend.encode(text, add_special_tokens=False)
        spans = encoding.offsets
        # Of several tokens for one character (its bytes), which all have its span, only the last one ends it.
        return list(encoding.ids), [start if (start, end) == following else end for (start, end), following in zip_longest(spans, spans[1:])]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, special tokens included."""
        return str(self.backend.decode(list(ids), skip_special_tokens=False))

    def added_token_id(self, text: str) -> int | None:
        """Return the id of the added token that is spelled `text`; None where there is none."""
        return next((number for number, token in self.backend.get_added_tokens_decoder().items() if token.content == text), None)

    def to_bytes(self) -> bytes:
        """Return tokenizer.json."""
        return self._file

    @cached_property
    def _file(self) -> bytes:
        return str(self.backend.to_str(pretty=True)).encode()

    def save(self, path: Path) -> None:
        """Write tokenizer.json."""
        with open_atomic(path) as file:
            file.write(self.to_bytes())


class SentencePieceTokenizer:
    """A SentencePiece model; see `TokenizerLike`. Control symbols have no spelling in a text: what spells one is text."""

    file_name = SENTENCEPIECE_MODEL

    def __init__(self, model: bytes, end_of_document: str, name: str) -> None:
        try:
            import sentencepiece
        except ImportError:
            raise MachineError(f"tokenizer={name!r} needs sentencepiece, which is not installed; run: pip install 'tpt-megatron[sentencepiece]'") from None
        self._model = model
        self.processor: Any = sentencepiece.SentencePieceProcessor()
        try:
            self.processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise DataError(f"{name}: not a SentencePiece model ({' '.join(str(error).split())})") from None
        self.end_of_document = end_of_document
        eod = self.added_token_id(end_of_document)
        if eod is None:
            raise ConfigError(f"end_of_document={end_of_document!r} is not a control symbol of {name}; name one that is, for example </s>")
        self.eod_id = eod

    @property
    def vocabulary_size(self) -> int:
        """Number of pieces."""
        return int(self.processor.vocab_size())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the model and the end-of-document token, 16 hex digits."""
        return hashlib.sha256(self._model + f"\n{self.end_of_document}".encode()).hexdigest()[:16]

    @cached_property
    def unknown_id(self) -> int | None:
        """Id of what the vocabulary cannot express; None where the model falls back to bytes."""
        has_bytes = any(self.processor.IsByte(number) for number in range(self.vocabulary_size))
        return None if has_bytes else int(self.processor.unk_id())

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without any symbol added around it."""
        return list(self.processor.EncodeAsIds(text))

    def ends(self, text: str) -> tuple[list[int], list[int]]:
        """Return the ids of `text`, and for each the character that it ends before."""
        mapping = self.processor.EncodeAsOffsetMapping(text)
        return mapping["ids"], [end for _, end in mapping["offsets"]]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; control symbols, which SentencePiece decodes to nothing, are spelled out."""
        parts: list[str] = []
        run: list[int] = []
        for number in ids:
            if self.processor.IsControl(int(number)):
                parts += [self.processor.DecodeIds(run), self.processor.IdToPiece(int(number))]
                run = []
            else:
                run.append(int(number))
        return "".join([*parts, self.processor.DecodeIds(run)])

    def added_token_id(self, text: str) -> int | None:
        """Return the id of the control or user-defined symbol `text`; None where there is none."""
        number = int(self.processor.PieceToId(text))
        is_whole = self.processor.IsControl(number) or (number != self.processor.unk_id() and self.processor.EncodeAsPieces(text)[-1:] == [text])
        return number if is_whole and self.processor.IdToPiece(number) == text else None

    def to_bytes(self) -> bytes:
        """Return the model file."""
        return self._model

    def save(self, path: Path) -> None:
        """Write the model file."""
        with open_atomic(path) as file:
            file.write(self._model)


def load_tokenizer(name: str, end_of_document: str) -> TokenizerLike:
    """Load `byte`, a `tokenizer.json`, a SentencePiece `.model`, or a folder that holds one of these.

    Raises ConfigError when the name stands for nothing or the end-of-document token is missing, DataError when the file
    is damaged, MachineError when sentencepiece is needed and not installed.
    """
    if name == BYTE_LEVEL:
        return Tokenizer(_byte_level(end_of_document), end_of_document)
    path = Path(name)
    if path.is_dir() and not (path / TOKENIZER_JSON).is_file() and (path / SENTENCEPIECE_MODEL).is_file():
        path = path / SENTENCEPIECE_MODEL
    if path.suffix == ".model" and path.is_file():
        return SentencePieceTokenizer(path.read_bytes(), end_of_document, str(path))
    return Tokenizer(read_tokenizer_json(name, _HINT), end_of_document)


def read_tokenizer_json(name: str, hint: str) -> tokenizers.Tokenizer:
    """Read a `tokenizer.json`, or that of a folder. ConfigError, with `hint`, when there is none; DataError when it is damaged."""
    path = Path(name)
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"tokenizer={name!r}: no such file; {hint}")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001  (the Rust library raises nothing narrower, for every kind of damage)
        raise DataError(f"{path}: not a tokenizer.json ({error})") from None


def _byte_level(end_of_document: str) -> tokenizers.Tokenizer:
    """256 bytes and the end-of-document token, which gets id 256: no file needed, every text is representable."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([end_of_document])
    return backend


def train_word_tokenizer(texts: Iterable[str], words: Sequence[str] = (), end_of_document: str = END_OF_DOCUMENT) -> Tokenizer:
    """Make a tokenizer whose tokens are the words that white space separates; for closed vocabularies such as the demo's.

    `words` are added whether or not the texts hold them. Words seen later that are not in the vocabulary become `<unk>`.
    """
    found = {word for text in texts for word in text.split()}
    vocabulary = ["<unk>", *words, *sorted(found - {"<unk>", end_of_document, *words})]
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab={word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([end_of_document])  # outside the model's words, so that no text encodes to it
    return Tokenizer(backend, end_of_document)  # without a decoder, words are joined by one space
