"""Whether a text repeats an evaluation set: runs of words that both have.

Texts are compared by their words, lower case and without punctuation; each character of Chinese and Japanese is a word,
since nothing sets their words apart. A run of words is held as one 64-bit number.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tpt_megatron.config.augment import Contamination
from tpt_megatron.errors import ConfigError, DataError, RecordError
from tpt_megatron.files import parse_json_line, read_lines

Hashes = npt.NDArray[np.uint64]

SHORTEST_TEXT_WORDS = 8  # a shorter text of an evaluation set says too little: "true or false"
_MULTIPLIER = 0x9E3779B97F4A7C15  # odd, so that no unit's bits are lost
_SPACELESS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_SPACELESS}]|[^\W_{_SPACELESS}]+")

_ASCII_PUNCTUATION = "".join(character if character.isalnum() else " " for character in map(chr, range(128)))


def run_hashes(units: Hashes, length: int) -> Hashes:
    """Return one hash for each run of `length` neighbouring units: [n] to [n - length + 1], or to [0] when there are fewer.

    The hash is the polynomial of the run's units in one odd number, modulo 2**64; it takes about log2(length) passes.
    """
    count = len(units) - length + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    result: Hashes | None = None
    blocks, size, taken, multiplier = units, 1, 0, _MULTIPLIER  # blocks[i] is the hash of units[i : i + size]
    while True:
        factor = np.uint64(multiplier)
        if length & size:
            piece = blocks[taken : taken + count]
            result = piece if result is None else result * factor + piece
            taken += size
            if taken == length:
                return result
        blocks = blocks[:-size] * factor + blocks[size:]
        size, multiplier = 2 * size, multiplier * multiplier % (1 << 64)


def normalised_words(text: str) -> list[str]:
    """Return a text's words as evaluation sets are compared: NFKC, lower case, without punctuation."""
    if text.isascii():
        return text.lower().translate(_ASCII_PUNCTUATION).split()
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


class ContaminationIndex:
    """The runs of `config.words` words of evaluation sets, 8 bytes each, and a hash for each distinct word.

    A text of an evaluation set that is shorter, but has at least 8 words, is one run. Two different runs share a hash
    with odds of 2**-64: a thought of 1,000 words is taken for a repetition of an index of a thousand million runs by
    mistake once in about 20 million thoughts.

    Raises ConfigError for a file that is missing, of no known kind, or has none of `config.fields`; DataError (with
    FILE:LINE) for one that cannot be read or holds nothing to compare with.
    """

    def __init__(self, config: Contamination) -> None:
        self._word_hashes: dict[str, int] = {}
        collected: dict[int, list[Hashes]] = {}
        fields_seen: set[str] = set()
        for name in config.files:
            before, fields_here = sum(map(len, collected.values())), set[str]()
            for where, record in _records(name):
                if not isinstance(record, dict):
                    raise DataError(f"{where}: a record must be a JSON object, found a {type(record).__name__}")
                fields_here.update(record)
                for key in config.fields or record:
                    for text in _texts(record.get(key)):
                        self._collect(text, config.words, collected)
            _refuse_missing(config.fields, fields_here, name, any_suffices=True)
            if sum(map(len, collected.values())) == before:
                raise DataError(f"{name}: nothing to compare with: it holds no text of {min(config.words, SHORTEST_TEXT_WORDS)} words or more")
            fields_seen |= fields_here
        _refuse_missing(config.fields, fields_seen, ", ".join(config.files), any_suffices=False)
        self._runs = [(length, np.unique(np.concatenate(parts))) for length, parts in sorted(collected.items(), reverse=True)]

    def _collect(self, text: str, length: int, collected: dict[int, list[Hashes]]) -> None:
        words = normalised_words(text)
        if len(words) < length:
            if len(words) < SHORTEST_TEXT_WORDS:
                return
            length = len(words)
        for word in words:
            if word not in self._word_hashes:
                digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
                self._word_hashes[word] = int.from_bytes(digest, "little")
        collected.setdefault(length, []).append(run_hashes(self._units(words), length))

    def _units(self, words: list[str]) -> Hashes:
        # A word that no evaluation set has is 0: a run with it can only match by chance, as any run can.
        return np.fromiter(map(self._word_hashes.get, words, repeat(0)), np.uint64, len(words))

    def __len__(self) -> int:
        """Return the number of distinct runs."""
        return sum(len(hashes) for _, hashes in self._runs)

    @property
    def fingerprint(self) -> str:
        """16 hex digits that cover the runs, whatever the order of files and records."""
        digest = hashlib.sha256()
        for length, hashes in self._runs:
            digest.update(f"{length} {len(hashes)}\n".encode())
            digest.update(hashes.astype("<u8").tobytes())
        return digest.hexdigest()[:16]

    def find(self, text: str) -> str | None:
        """Return the first run of words of `text` that an evaluation set has, normalised; None where there is none."""
        words = normalised_words(text)
        units = self._units(words)
        for length, hashes in self._runs:
            wanted = run_hashes(units, length)
            hits = hashes.take(np.searchsorted(hashes, wanted), mode="clip") == wanted
            if hits.any():
                first = int(hits.argmax())
                return " ".join(words[first : first + length])
        return None


def _refuse_missing(wanted: tuple[str, ...], present: set[str], name: str, *, any_suffices: bool) -> None:
    """Raise ConfigError when records have none (or, without `any_suffices`, not each) of the fields that were named."""
    missing = [field for field in wanted if field not in present]
    if missing and (not any_suffices or len(missing) == len(wanted)):
        has = ", ".join(sorted(present)) or "no field"
        raise ConfigError(f"checks.contamination.fields: no record of {name} has a field {missing[0]!r}; it has: {has}")


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts of a field: its own, those of a list such as answer choices, those of an object."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def _records(name: str) -> Iterator[tuple[str, Any]]:
    """Yield (FILE:LINE, parsed record) of a JSONL or Parquet file."""
    path = Path(name)
    if not path.is_file():
        raise ConfigError(f"checks.contamination.files: {name}: no such file")
    if path.suffix == ".parquet":
        yield from _parquet_records(path)
    elif path.name.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")):
        for number, line in read_lines(path):
            if line.strip():
                try:
                    yield f"{name}:{number}", parse_json_line(line, f"{name}:{number}")
                except RecordError as error:  # not one of the records that may be set aside
                    raise DataError(str(error)) from None
    else:
        raise ConfigError(f"checks.contamination.files: {name}: of no known kind; give a .jsonl, .jsonl.gz, .jsonl.zst or .parquet file")


def _parquet_records(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", record
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file after row {number} ({error})") from None
