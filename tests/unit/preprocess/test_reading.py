"""Pieces of a file, read apart: together they give every line once, with its place, however the file is cut."""

from __future__ import annotations

import gzip
import hashlib
import json
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tpt_megatron.bad_records import LineCounts
from tpt_megatron.errors import ConfigError, DataError, RecordError
from tpt_megatron.preprocess import long_text, reading
from tpt_megatron.preprocess.plan import PLAN_VERSION, Piece, Plan, make_plan, part_of
from tpt_megatron.preprocess.reading import LineNumbers, LongDocument, PieceReader
from tpt_megatron.records import FieldNames
from tpt_megatron.storage import LocalLocation

LINES = st.lists(st.sampled_from([b"", b" ", b"{", b'{"text": "a"}', b'{"text": "bb", "id": "x"}\r', b'{"text": "' + b"long " * 30 + b'"}']), max_size=12)


class Read:
    """What came of reading some pieces of a file."""

    def __init__(self, refused_text: str | None = None) -> None:
        self._refused_text = refused_text
        self.texts: list[str] = []
        self.bad: list[str] = []
        self.counts = LineCounts()

    def piece(self, path: Path, piece: Piece, *, longest: int = 10_000) -> None:
        numbers = LineNumbers()

        def set_aside(line: bytes, error: RecordError) -> None:
            self.bad.append(f"{error.where.removeprefix(str(path))} {line[:20]!r} {error.reason}")

        reader = PieceReader(LocalLocation(path), piece, FieldNames(), longest, set_aside, numbers, lambda amount: None, refused_text=self._refused_text)
        for batch in reader.batches():
            if isinstance(batch, LongDocument):
                self.texts.append("".join(batch.text.pieces()))
                assert hashlib.sha256(self.texts[-1].encode()).digest() == batch.sha256
            else:
                self.texts += [augmented.document.text for augmented in batch]
        for name in ("lines_read", "records", "bad_records", "blank_lines"):
            setattr(self.counts, name, getattr(self.counts, name) + getattr(reader.counts, name))


def read_whole(path: Path, **options: bool | int) -> Read:
    read = Read()
    read.piece(path, Piece(0, 0, 0, path.stat().st_size), **options)  # type: ignore[arg-type]
    return read


@hypothesis_settings(max_examples=200)
@given(LINES, st.booleans(), st.booleans(), st.lists(st.integers(3, 400), max_size=4), st.integers(3, 40))
def test_every_line_belongs_to_one_piece(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], ends: bool, mark: bool, cuts: list[int], block: int
) -> None:
    path = tmp_path_factory.mktemp("cut") / "in.jsonl"
    path.write_bytes((b"\xef\xbb\xbf" if mark else b"") + b"\n".join(lines) + (b"\n" if ends and lines else b""))
    size = path.stat().st_size
    bounds = [0, *sorted(min(cut, size) for cut in cuts), size]
    read = Read()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "BLOCK", block)
        for number, (start, stop) in enumerate(pairwise(bounds)):
            read.piece(path, Piece(number, 0, start, stop))
    expected = [json.loads(line)["text"] for line in lines if line.startswith(b'{"')]
    assert read.texts == expected
    # An empty last line without an end is no line.
    count = len(lines) if ends or (lines and lines[-1]) or not lines else len(lines) - 1
    assert (read.counts.lines_read, read.counts.records, read.counts.bad_records) == (count, len(expected), lines.count(b"{"))
    assert read.counts.lines_read == read.counts.records + read.counts.bad_records + read.counts.blank_lines
    places = [f":{number}" for number, line in enumerate(lines, 1) if line == b"{"]
    assert [entry.split()[0] for entry in read.bad] == places


def test_a_compressed_file_is_read_whole_and_a_cut_off_one_refused(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl.gz"
    data = b"".join(b'{"text": "document %d"}\n' % i for i in range(20_000))
    path.write_bytes(gzip.compress(data))
    assert len(read_whole(path).texts) == 20_000
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"in\.jsonl\.gz: the compressed file is damaged or cut off after line \d+"):
        read_whole(path)


def test_a_long_text_is_kept_apart_and_a_too_long_record_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BLOCK", 50)
    monkeypatch.setattr(reading, "LONG_LINE", 100)
    monkeypatch.setattr(long_text, "LONG_LINE", 100)
    monkeypatch.setattr(reading, "SHOWN", 30)
    path = tmp_path / "in.jsonl"
    long, endless = "wörd " * 100, "x" * 5000
    path.write_text("".join(json.dumps({"text": text}) + end for text, end in (("a", "\n"), (long, "\r\n"), (endless, "\n"), ("b", "\n"), (long, ""))))
    read = read_whole(path, longest=2000)
    assert read.texts == ["a", long, "b", long]
    assert len(read.bad) == 1
    assert read.bad[0].startswith(f':3 b\'{{"text": "xxxxxxxxxx\' the record has {5000 + 12:,} bytes, more than max_record_megabytes allows')
    assert (read.counts.lines_read, read.counts.records, read.counts.bad_records) == (5, 4, 1)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"x" * 200 + b"\xff", "not valid JSON"),
        (b" " * 300, "field 'text' is empty"),
        (b"x" * 200 + b"\\ud800", "not valid JSON"),
        (b"\t" * 200, "not valid JSON"),
    ],
)
def test_a_long_text_is_checked_before_anything_of_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: bytes, reason: str) -> None:
    monkeypatch.setattr(reading, "BLOCK", 50)
    monkeypatch.setattr(reading, "LONG_LINE", 100)
    monkeypatch.setattr(long_text, "LONG_LINE", 100)
    (tmp_path / "in.jsonl").write_bytes(b'{"text": "a"}\n{"text": "' + text + b'", "id": "l"}\n{"text": "b"}\n')
    read = read_whole(tmp_path / "in.jsonl")
    assert read.texts == ["a", "b"]
    assert len(read.bad) == 1 and read.bad[0].startswith(":2 ") and reason in read.bad[0]


@pytest.mark.parametrize(
    ("line", "repeated"),
    [
        (b'{"text": "a", "text": "b"}', True),
        (b'{"text": "a", "id": "\\"text\\"", "meta": {"text": "b"}}', False),
        (b'{"text": "say \\"text\\": once"}', False),
        (b'{"text": "a", "thoughts": [{"text": "t", "generator": "g"}]}', False),
        (b'{"text": "a", "thoughts": [{"text": "t", "text": "u", "generator": "g"}]}', True),
        (b'{"text": "a", "thoughts": [{"text": "t", "generator": "g"}], "thoughts": [{"text": "u", "generator": "g"}]}', True),
        (b'{"id": "a", "text": "a", "id": "b"}', True),
        (b'{"text": "a", "source": "a", "source": "b"}', True),
        (b'{"id": "a", "text": "a", "meta": {"id": "b"}}', False),
        (b'{"text": "\xc3\xa9\\u00e9 \\"id\\": 1", "id": "b", "meta": {"source": "c"}}', False),
        (b'{"text": "a", "thoughts": [], "thoughts": [{"text": "u", "generator": "g"}]}', True),
        (b'{"thoughts": [{"text": "t", "generator": "g"}], "id": "a", "id": "b", "text": "%b"}' % (b"long " * 99), True),
        (b'{"thoughts": [{"text": "t", "generator": "g"}], "id": "a", "text": "%b"}' % (b"long " * 99), False),
        (b'{"text": "a", "t\\u0065xt": "b"}', True),
        (b'{"\\u0074ext": "a", "text": "b"}', True),
        (b'{"text": "a", "id": "1", "\\u0069d": "2"}', True),
        (b'{"text": "a", "thoughts": [{"text": "t", "generator": "g", "t\\u0065xt": "u"}]}', True),
        (b'{"text": "\\u0041 \\" \\\\", "id": "1", "thoughts": [{"text": "\\u0041", "generator": "g"}]}', False),
        (b'{"text": "a", "text": "%b"}' % (b"long " * 99), True),
        (b'{"text": "%b", "text": "a"}' % (b"long " * 99), True),
        (b'{"meta": {"text": "a"}, "text": "a", "text": "%b"}' % (b"long " * 99), True),
        (b'{"meta": {"text": "a"}, "text": "%b"}' % (b"long " * 99), False),
        (b'{"kind": "text", "text": "a", "text": "%b"}' % (b"\\u00e9" * 99), True),
        (b'{"kind": "text", "text": "%b say \\"text"}' % (b"\\u00e9" * 99), False),
    ],
)
def test_a_key_that_stands_twice_is_a_bad_record(tmp_path: Path, line: bytes, repeated: bool) -> None:
    (tmp_path / "in.jsonl").write_bytes(line + b"\n")
    read = read_whole(tmp_path / "in.jsonl")
    assert len(read.bad) == repeated
    assert not repeated or "stands twice in one object" in read.bad[0]


def test_thoughts_that_are_not_about_the_text_are_bad(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    thoughts = [{"seen_end": 3}, {"seen_end": 4}, {"document_hash": "0" * 16}, {}]
    path.write_text("".join(json.dumps({"text": "abc", "thoughts": [{"text": "t", "generator": "g", **thought}]}) + "\n" for thought in thoughts))
    read = read_whole(path)
    assert len(read.texts) == 2
    assert "thought 1 saw characters up to 4, the document has 3" in read.bad[0]
    assert "thought 1 is about another text" in read.bad[1]


def plan_of(folder: Path, megabytes: float | None = None) -> Plan:
    return make_plan([LocalLocation(path) for path in sorted(folder.iterdir())], {}, megabytes)


def test_a_plan_covers_every_byte_and_row_once(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"x" * 1050)
    (tmp_path / "b.jsonl.gz").write_bytes(b"x" * 5000)
    (tmp_path / "c.jsonl").touch()
    pq.write_table(pa.table({"text": ["some text"] * 1000}), tmp_path / "d.parquet", row_group_size=100)
    plan = plan_of(tmp_path, 0.0005)
    assert [(piece.file, piece.start, piece.stop) for piece in plan.pieces[:5]] == [(0, 0, 350), (0, 350, 700), (0, 700, 1050), (1, 0, 5000), (2, 0, 0)]
    rows = [(piece.start, piece.stop) for piece in plan.pieces if piece.file == 3]
    assert rows[0][0] == 0 and rows[-1][1] == 1000 and len(rows) > 3
    assert all(first[1] == second[0] for first, second in pairwise(rows))
    assert [piece.number for piece in plan.pieces] == list(range(len(plan.pieces)))
    assert len(plan_of(tmp_path).pieces) == 4
    assert Plan.read(_written(tmp_path / "plan.json", plan)) == plan


def _written(path: Path, plan: Plan) -> LocalLocation:
    path.write_bytes(plan.to_bytes())
    return LocalLocation(path)


def test_the_plan_is_the_same_for_files_that_were_copied(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"x" * 10)
    before = plan_of(tmp_path)
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "a.jsonl").write_bytes(b"x" * 10)
    after = plan_of(tmp_path)
    assert before.fingerprint() == after.fingerprint()
    assert before.stamps != after.stamps
    (tmp_path / "a.jsonl").write_bytes(b"x" * 11)
    assert plan_of(tmp_path).fingerprint() != before.fingerprint()


@given(st.integers(1, 40), st.integers(1, 12))
def test_parts_of_the_work_are_all_of_it_in_order(pieces: int, count: int) -> None:
    plan = Plan({}, (("a", 1),), ("s",), tuple(Piece(i, 0, i, i + 1) for i in range(pieces)))
    if count > pieces:
        with pytest.raises(ConfigError, match="give fewer shards"):
            part_of(plan, 0, count)
        return
    parts = [part_of(plan, number, count) for number in range(count)]
    assert [piece for part in parts for piece in part] == list(plan.pieces)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_damaged_plan_and_a_missing_input_are_said(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"plan_version": 1}')
    with pytest.raises(DataError, match="not a plan of this release"):
        Plan.read(LocalLocation(tmp_path / "plan.json"))
    (tmp_path / "plan.json").write_text(f'{{"plan_version": {PLAN_VERSION}}}')
    with pytest.raises(DataError, match="a damaged plan"):
        Plan.read(LocalLocation(tmp_path / "plan.json"))
    with pytest.raises(DataError, match=r"none\.jsonl: no such file"):
        make_plan([LocalLocation(tmp_path / "none.jsonl")], {}, None)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (b'{"meta": {"text": "%b"}, "text": "short one"}', "short one"),
        (b'{"text": "the document", "thoughts": [{"text": "%b", "generator": "g"}]}', "the document"),
        (b'{"text": "", "meta": {"text": "%b"}}', None),
        (b'{"text": "%b", "text": "the last"}', None),
        (b'{"text": "the first", "text": "%b"}', None),
        (b'{"text": "%b", "id": "a", "id": "b"}', None),
        (b'{"text": "%b", "thoughts": [{"text": "t", "generator": "g", "document_hash": "0000"}]}', None),
        (b'{"text": "%b", "meta": "</s>"}', "long"),
        (b'{"text": "%b<\\/s>"}', None),
        (b'{"text": "%b", "id": "x"}', "long"),
    ],
)
def test_long_and_short_records_are_judged_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: bytes, expected: str | None) -> None:
    long = b"word " * 60
    (tmp_path / "in.jsonl").write_bytes(record.replace(b"%b", long) + b"\n")
    found = []
    for limit in (50, 10_000):
        monkeypatch.setattr(reading, "LONG_LINE", limit)
        monkeypatch.setattr(long_text, "LONG_LINE", limit)
        monkeypatch.setattr(reading, "BLOCK", 64)
        read = Read("</s>")
        read.piece(tmp_path / "in.jsonl", Piece(0, 0, 0, 10_000))
        found.append((read.texts, len(read.bad)))
    assert found[0] == found[1] == (([long.decode() if expected == "long" else expected], 0) if expected else ([], 1))


def test_what_is_nested_deeply_or_has_very_many_keys_stops_nothing(tmp_path: Path) -> None:
    deep = b'{"text": "a", "kind": "text", "deep": ' + b"[" * 1000 + b"]" * 1000 + b"}"
    many = b'{"text": "a", "kind": "text", "many": {' + b", ".join(b'"k%d": 1' % i for i in range(40_000)) + b"}}"
    (tmp_path / "in.jsonl").write_bytes(deep + b"\n" + many + b"\n")
    read = read_whole(tmp_path / "in.jsonl", longest=10_000_000)
    assert read.texts == ["a"]
    assert "nested too deeply" in read.bad[0] or "recursion" in read.bad[0].lower()
