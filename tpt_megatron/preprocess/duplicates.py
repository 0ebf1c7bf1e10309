"""Finding documents that were there before, in bounded memory: keys of documents are sorted bucket by bucket on disk.

Exact: a document's key is the first 128 bits of its text's SHA-256. Near: a document has a key for each band of its MinHash
(datasketch), and texts whose Jaccard similarity of word runs is over the threshold share one with high probability. In
either case a document goes when an earlier one, in the inputs' order, has a key of its own.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tpt_megatron.config.preprocess import NearDuplicates
from tpt_megatron.errors import ConfigError, MachineError

ENTRY = np.dtype([("key", "<u8", 2), ("document", "<u8")])
BUCKET_BYTES = 48_000_000
ENTRIES_AT_ONCE = 1 << 19
SHINGLES_AT_ONCE = 4096


def exact_key(sha256: bytes) -> bytes:
    """Return a document's one key, of 16 bytes."""
    return sha256[:16]


class NearKeys:
    """Keys of nearly equal texts: one of 16 bytes for each band."""

    def __init__(self, config: NearDuplicates) -> None:
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError:
            raise MachineError("deduplicate=near needs datasketch, which is not installed; run: pip install 'tpt-megatron[neardup]'") from None
        self._config = config
        self._empty = MinHash(num_perm=config.permutations, seed=1)
        try:
            index = MinHashLSH(threshold=config.threshold, num_perm=config.permutations)
        except ValueError as error:
            raise ConfigError(f"near_duplicates: threshold={config.threshold} with permutations={config.permutations} is impossible ({error})") from None
        self.bands, self._rows = index.b, index.r

    def keys(self, pieces: Iterable[str]) -> bytes:
        """Return the keys of a text that comes in pieces. Texts of fewer words than a run are compared as a whole."""
        minhash = self._empty.copy()
        for piece in pieces:
            shingles = sorted(self._shingles(piece))
            for begin in range(0, len(shingles), SHINGLES_AT_ONCE):  # the library holds them times the permutations
                minhash.update_batch(shingles[begin : begin + SHINGLES_AT_ONCE])
        values = minhash.hashvalues.astype("<u8").tobytes()
        width = 8 * self._rows
        bands = (band.to_bytes(2, "little") + values[band * width : (band + 1) * width] for band in range(self.bands))
        return b"".join(hashlib.blake2b(band, digest_size=16).digest() for band in bands)

    def _shingles(self, piece: str) -> set[bytes]:
        length, words = self._config.shingle_words, piece.lower().split()
        return {" ".join(words[i : i + length]).encode() for i in range(max(1, len(words) - length + 1))}


def first_ones(key_files: Sequence[Path], documents: Sequence[int], keys_per_document: int, folder: Path) -> npt.NDArray[np.bool_]:
    """Return, for all documents of all files in order, whether each is the first of its kind. [documents] bool, in a file in `folder`.

    Each file holds `keys_per_document` keys of 16 bytes a document; `documents` are the files' numbers of documents.
    """
    total = sum(documents)
    kept: npt.NDArray[np.bool_] = np.lib.format.open_memmap(folder / "kept.npy", "w+", np.bool_, (max(1, total),))
    kept[:] = True
    buckets = max(1, math.ceil(total * keys_per_document * ENTRY.itemsize / BUCKET_BYTES))
    paths = [folder / f"bucket-{number}" for number in range(buckets)]
    for path in paths:
        path.touch()
    for block in _entries(key_files, documents, keys_per_document):
        entries = _without_repeats(block, kept)  # so that a text of which there are millions fills no bucket
        numbers = entries["key"][:, 0] % np.uint64(buckets)
        order = np.argsort(numbers, kind="stable")
        bounds = np.searchsorted(numbers[order], np.arange(buckets + 1, dtype=np.uint64))
        for path, (begin, end) in zip(paths, pairwise(bounds), strict=True):
            if end > begin:
                with open(path, "ab") as file:  # opened each time: there may be more of them than a process may hold open
                    file.write(entries[order[begin:end]].tobytes())
    for path in paths:
        _without_repeats(np.fromfile(path, ENTRY), kept)
        path.unlink()
    return kept[:total]


def _without_repeats(entries: npt.NDArray[Any], kept: npt.NDArray[np.bool_]) -> npt.NDArray[Any]:
    """Return the first document's entry of each key, and mark the later ones as not kept."""
    order = np.lexsort((entries["document"], entries["key"][:, 1], entries["key"][:, 0]))
    entries = entries[order]
    keys, numbers = entries["key"], entries["document"]
    again = (keys[1:] == keys[:-1]).all(axis=1)
    kept[numbers[1:][again & (numbers[1:] != numbers[:-1])]] = False
    return entries[np.concatenate(([True], ~again))] if len(entries) else entries


def _entries(key_files: Sequence[Path], documents: Sequence[int], keys_per_document: int) -> Iterator[npt.NDArray[Any]]:
    first = 0
    for path, count in zip(key_files, documents, strict=True):
        step = max(1, ENTRIES_AT_ONCE // keys_per_document)
        with open(path, "rb") as file:
            for begin in range(0, count, step):
                chosen = min(step, count - begin)
                entries = np.empty(chosen * keys_per_document, ENTRY)
                entries["key"] = np.frombuffer(file.read(chosen * keys_per_document * 16), "<u8").reshape(-1, 2)
                entries["document"] = np.repeat(np.arange(first + begin, first + begin + chosen, dtype=np.uint64), keys_per_document)
                yield entries
        first += count
