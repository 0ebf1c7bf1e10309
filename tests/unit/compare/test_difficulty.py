import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.token_files import write_token_files
from tpt_megatron.compare import difficulty as module
from tpt_megatron.compare.difficulty import read_difficulty
from tpt_megatron.errors import DataError, UsageError


def write_losses(folder: Path, prefix: Path, rows: list[tuple[int, str, float]]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "losses.json").write_text(json.dumps({"data": str(prefix), "reference": "a base"}))
    document, part, loss = zip(*rows, strict=True)
    columns = {"document": document, "part": pa.array(part).dictionary_encode(), "loss/a base": pa.array(loss, pa.float32())}
    pq.write_table(pa.table(columns), folder / "tokens.parquet")


def test_losses_are_means_of_documents_own_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_token_files(tmp_path / "data", [([i], [7], None) for i in range(10)])
    rows = [(1, "document", 1.0), (1, "thinking", 9.0), (1, "document", 2.0), (8, "document", 4.0), (9, "thinking", 5.0)]
    write_losses(tmp_path / "losses", tmp_path / "data", rows)
    for block in (1 << 18, 2):
        monkeypatch.setattr(module, "_BLOCK", block)
        for path in (tmp_path / "losses", tmp_path / "losses/losses.json"):
            found = read_difficulty(path, None)
            assert found.of == {"1": 1.5, "8": 4.0}
            assert (found.what, found.known, found.is_number) == ("mean loss a token under a base", 2, True)


def test_a_field_of_records(tmp_path: Path) -> None:
    records = [
        {"id": 1, "text": "a", "level": 3},
        {"id": "x", "text": "b", "level": 2.5},
        {"id": "no", "text": "c", "level": None},
        {"id": "false", "text": "c", "level": False},
        {"text": "d"},
        {"level": 4},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + "\n{broken\n")
    found = read_difficulty(tmp_path / "in.jsonl", "level")
    assert (found.of, found.known, found.is_number) == ({"1": 3.0, "x": 2.5}, 2, True)
    (tmp_path / "in.jsonl").write_text('{"id": "a", "text": "t", "source": "hard"}\n{"id": "b", "text": "t", "source": "easy"}\n')
    found = read_difficulty(tmp_path, "source")
    assert (found.of, found.is_number) == ({"a": "hard", "b": "easy"}, False)


def test_of_many_a_sample_is_taken_that_files_and_order_do_not_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DOCUMENTS", 50)
    found = []
    for order in (range(1000), range(999, -1, -1)):
        (tmp_path / "in.jsonl").write_text("".join(json.dumps({"id": f"d{i}", "text": "t", "level": i}) + "\n" for i in order))
        found.append(read_difficulty(tmp_path / "in.jsonl", "level"))
    assert found[0].known == 1000
    assert len(found[0].of) == 50
    assert found[0].of == {identity: found[1].of[identity] for identity in found[0].of}
    assert 300 < sum(found[0].of.values()) / 50 < 700  # type: ignore[arg-type]


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"id": "a", "text": "t"}\n')
    with pytest.raises(UsageError, match=r"not an output of tpt losses .* give --difficulty-field, too"):
        read_difficulty(tmp_path / "in.jsonl", None)
    with pytest.raises(DataError, match="no record has a number or a text in the field 'level'"):
        read_difficulty(tmp_path / "in.jsonl", "level")
    write_losses(tmp_path / "losses", tmp_path / "nowhere", [(0, "document", 1.0)])
    with pytest.raises(DataError, match=r"nowhere\.idx: no such file"):
        read_difficulty(tmp_path / "losses", None)
    write_token_files(tmp_path / "data", [([1], [7], None)])
    write_losses(tmp_path / "losses", tmp_path / "data", [(0, "thinking", 1.0)])
    with pytest.raises(DataError, match=r"no document of .* has a loss on a token of its own"):
        read_difficulty(tmp_path / "losses", None)
    (tmp_path / "losses/tokens.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"tokens\.parquet: cannot be read"):
        read_difficulty(tmp_path / "losses", None)
    (tmp_path / "losses/losses.json").write_text("[]")
    with pytest.raises(DataError, match=r"not the losses\.json that tpt losses writes"):
        read_difficulty(tmp_path / "losses", None)
