from __future__ import annotations

import hashlib
import io
import json
import os
import threading
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from tpt_megatron.convert import streaming  # noqa: E402
from tpt_megatron.convert.hugging_face import SINGLE, HuggingFaceTensors, writing  # noqa: E402
from tpt_megatron.convert.streaming import Budget, StreamedView, StreamedWriter  # noqa: E402
from tpt_megatron.errors import ConversionError  # noqa: E402


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "_AT_ONCE", 1000)
    monkeypatch.setattr(streaming, "_WINDOW", 3000)


def test_what_is_written_in_pieces_is_whole_and_its_checksum_is_the_files(tmp_path: Path) -> None:
    pieces = [os.urandom(length) for length in (5, 12_345, 0, 1000, 999)]
    with StreamedWriter(tmp_path / "file", with_checksum=True) as file:
        for piece in pieces:
            assert file.write(piece) == len(piece)
        assert file.tell() == sum(map(len, pieces))
    assert (tmp_path / "file").read_bytes() == b"".join(pieces)
    assert (file.entry().bytes, file.entry().sha256) == (len(b"".join(pieces)), hashlib.sha256(b"".join(pieces)).hexdigest())


def test_a_view_is_the_part_of_a_file_and_ends_where_it_does(tmp_path: Path) -> None:
    data = os.urandom(9000)
    (tmp_path / "file").write_bytes(data)
    with StreamedView(tmp_path / "file", 17, 8000) as view:
        assert view.read() == data[17:8017]
        assert view.seek(-5, io.SEEK_END) == 7995
        assert view.read(100) == data[8012:8017]
        assert view.read(1) == b""
    with StreamedView(tmp_path / "file", 8990, 100) as view:  # the file is shorter than it should be
        assert view.readinto(bytearray(100)) == 10


def test_tensors_are_written_in_another_type_and_read_as_they_are(tmp_path: Path) -> None:
    tensor = torch.randn(77, 33)
    with writing(tmp_path / SINGLE, {"a": (77, 33), "b": (5,)}, torch.bfloat16) as take:
        take("a", tensor)
        take("b", tensor[:5, 3])
    tensors = HuggingFaceTensors(tmp_path)
    assert torch.equal(tensors.read("a"), tensor.bfloat16())
    assert torch.equal(tensors.read("b"), tensor[:5, 3].bfloat16())


def test_a_tensor_whose_bytes_are_not_its_shapes_is_refused(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    (tmp_path / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ConversionError, match="a cannot be read, the file is damaged \\(it has 8 bytes, its shape asks for 12\\)"):
        HuggingFaceTensors(tmp_path).read("a")


def test_threads_never_have_more_than_the_budget_together_and_all_come_to_their_turn() -> None:
    budget, lock = Budget(10), threading.Lock()
    taken = most = 0

    def work(count: int) -> None:
        nonlocal taken, most
        for _ in range(200):
            with budget.taking(count):
                with lock:
                    taken += min(count, 10)
                    most = max(most, taken)
                with lock:
                    taken -= min(count, 10)

    threads = [threading.Thread(target=work, args=(count,)) for count in (3, 4, 7, 99)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert most <= 10
    with pytest.raises(ValueError, match="given back"), budget.taking(10):
        raise ValueError("given back")
    with budget.taking(10):
        pass
