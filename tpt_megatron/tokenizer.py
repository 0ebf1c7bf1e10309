"""One face over tokenizers: a Hugging Face `tokenizer.json` (or its folder), byte level, or words of a closed vocabulary.

Every kind is held as a `tokenizers.Tokenizer`, so that whatever was trained on exports as a `tokenizer.json`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import orjson
import tokenizers

from tpt_megatron.errors import ConfigError, DataError
from tpt_megatron.files import write_text

BYTE_LEVEL = "byte"
END_OF_DOCUMENT = "<|endoftext|>"


class Tokenizer:
    """Text to token ids and back, with a fingerprint that says whether two tokenizers are the same.

    `end_of_document` is the token that closes every document; it must be one token of the vocabulary.
    """

    def __init__(self, backend: tokenizers.Tokenizer, end_of_document: str) -> None:
        self._backend = backend
        backend.no_padding()
        backend.no_truncation()
        # Text that spells a special token, in a document, is text: it must not end the document. Not kept in tokenizer.json.
        backend.encode_special_tokens = True
        eod = backend.token_to_id(end_of_document)
        if eod is None:
            raise ConfigError(f"end_of_document={end_of_document!r} is not a token of this tokenizer; name one that is, for example </s> or <|endoftext|>")
        self.end_of_document = end_of_document
        self.eod_id: int = eod

    @property
    def vocabulary_size(self) -> int:
        """Number of ids, added tokens included: one more than the largest id."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer's definition and its end-of-document token, 16 hex digits."""
        return hashlib.sha256(f"{self._backend.to_str()}\n{self.end_of_document}".encode()).hexdigest()[:16]

    @property
    def unknown_id(self) -> int | None:
        """Id that stands for what the vocabulary cannot express; None where every text can be expressed."""
        model = orjson.loads(self._backend.to_str())["model"]
        if model.get("unk_id") is not None:  # Unigram
            return int(model["unk_id"])
        return None if model.get("unk_token") is None else self._backend.token_to_id(model["unk_token"])

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without any special token added around it."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        """Return the ids of each text, as `encode` does, on as many threads as the machine has."""
        return [np.array(encoding.ids, dtype=np.int32) for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, special tokens included."""
        return str(self._backend.decode(list(ids), skip_special_tokens=False))

    def save(self, path: Path) -> None:
        """Write `tokenizer.json`."""
        write_text(path, self._backend.to_str(pretty=True))


def load_tokenizer(name: str, end_of_document: str) -> Tokenizer:
    """Load `byte`, a `tokenizer.json`, or a folder that holds one.

    Raises ConfigError when the name stands for nothing or the end-of-document token is missing, DataError when the file
    is damaged.
    """
    if name == BYTE_LEVEL:
        return Tokenizer(_byte_level(end_of_document), end_of_document)
    return Tokenizer(read_tokenizer_json(name, "give 'byte', a tokenizer.json, or a folder that holds one"), end_of_document)


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
