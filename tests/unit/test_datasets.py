from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.support.datasets import write_dataset
from tpt_megatron.datasets import open_dataset, sidecar, token_dtype
from tpt_megatron.errors import DataError
from tpt_megatron.tokenizer import END_OF_DOCUMENT, load_tokenizer


def write(prefix: Path, *, plain: bool) -> None:
    sequences = [([(0, [1, 2, 3]), (1, [4, 5])], "a", None, "g"), ([(0, [6])], "b", "web", None)]
    write_dataset(prefix, load_tokenizer("byte", END_OF_DOCUMENT), sequences)
    if plain:
        sidecar(prefix, "parts.bin").unlink()


def test_a_plain_megatron_dataset_opens_without_sidecars(tmp_path: Path) -> None:
    write(tmp_path / "v1.5", plain=True)
    dataset = open_dataset(str(tmp_path / "v1.5"))
    assert dataset.tokens.tolist() == [1, 2, 3, 4, 5, 256, 6, 256]
    assert dataset.tokens.dtype == np.uint16
    assert dataset.lengths.tolist() == [6, 2]
    assert dataset.offsets.tolist() == [0, 6, 8]
    assert dataset.parts is None
    assert dataset.details is None


def test_sidecars_without_a_manifest_are_an_unfinished_dataset(tmp_path: Path) -> None:
    write(tmp_path / "train", plain=False)
    with pytest.raises(DataError, match="did not finish"):
        open_dataset(tmp_path / "train")


def _edit(ending: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def edit(prefix: Path) -> None:
        path = sidecar(prefix, ending)
        path.write_bytes(change(path.read_bytes()))

    return edit


DAMAGES = {
    "no such file": lambda prefix: sidecar(prefix, "bin").unlink(),
    "not a Megatron index": _edit("idx", lambda data: b"X" + data[1:]),
    "not a Megatron index (": _edit("idx", lambda data: data[:20]),
    "index version 2": _edit("idx", lambda data: data[:9] + struct.pack("<Q", 2) + data[17:]),
    "dtype code 77": _edit("idx", lambda data: data[:17] + b"\x4d" + data[18:]),
    "its header says": _edit("idx", lambda data: data[:-1]),
    "negative length": _edit("idx", lambda data: data[:34] + struct.pack("<i", -6) + data[38:]),
    "pointers do not follow": _edit("idx", lambda data: data[:34] + struct.pack("<i", 5) + data[38:]),
    "document boundaries": _edit("idx", lambda data: data[:-8] + struct.pack("<q", 1)),
    "the index says 16": _edit("bin", lambda data: data[:-2]),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_each_damage_is_named_in_one_line(message: str, tmp_path: Path) -> None:
    write(tmp_path / "train", plain=True)
    DAMAGES[message](tmp_path / "train")
    with pytest.raises(DataError) as caught:
        open_dataset(tmp_path / "train")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_dataset_without_tokens_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path / "train", load_tokenizer("byte", END_OF_DOCUMENT), [])
    sidecar(tmp_path / "train", "parts.bin").unlink()
    with pytest.raises(DataError, match="no token"):
        open_dataset(tmp_path / "train")


def test_the_dtype_changes_where_megatron_changes_it() -> None:
    assert (token_dtype(65499), token_dtype(65500)) == (np.uint16, np.int32)
