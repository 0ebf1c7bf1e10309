"""What the pages say of datasets written by the format's description, and of record files; what they refuse."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from tests.support.token_files import Sequence, write_token_files
from tpt_megatron.datasets import open_dataset
from tpt_megatron.errors import DataError, MachineError, UsageError
from tpt_megatron.files import FileEntry, Manifest
from tpt_megatron.inspection import records, show
from tpt_megatron.inspection import summary as summaries
from tpt_megatron.inspection.show import inspect_path
from tpt_megatron.inspection.summary import count_in, distribution, log_edges, percentiles, summarise
from tpt_megatron.tokenizer import load_tokenizer


def page(path: Path | str, *, width: int = 160, documents: int = 0, plot: Path | None = None, check: bool = False, coloured: bool = False) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=coloured, color_system="standard" if coloured else None)
    inspect_path(path, console, documents=documents, plot=plot, check=check)
    return out.getvalue()


def random_sequences(count: int) -> list[Sequence]:
    draw = np.random.default_rng(3)
    lengths = np.ceil(draw.lognormal(3, 1.2, (count, 2))).astype(int)
    return [([65] * int(d), [66] * int(t) if i % 3 else [], [None, "web", "code", "books"][i % 4]) for i, (d, t) in enumerate(lengths)]


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
@pytest.mark.parametrize("block", [13, 1 << 22])
def test_numbers_equal_direct_computation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, block: int) -> None:
    monkeypatch.setattr(summaries, "TOKENS_AT_ONCE", block)
    monkeypatch.setattr(summaries, "SEQUENCES_AT_ONCE", 7)
    sequences = random_sequences(200)
    write_token_files(tmp_path / "train", sequences, dtype)
    summary = summarise(open_dataset(tmp_path / "train"))
    document, thinking = [len(d) + 1 for d, _, _ in sequences], [len(t) for _, t, _ in sequences]
    assert summary.parts is not None and summary.by_source is not None
    assert {name: values.tolist() for name, values in summary.parts.items()} == {"document": document, "thinking": thinking}
    for values, told in ((document, percentiles(summary.parts["document"])), (thinking, percentiles(summary.parts["thinking"]))):
        ordered = sorted(values)
        assert told["mean"] == pytest.approx(sum(values) / 200)
        assert [told[f"{percent} %"] for percent in (1, 10, 50, 90, 99)] == [ordered[2 * percent - 1] for percent in (1, 10, 50, 90, 99)]
    for row in summary.by_source:
        of_it = [i for i, (_, _, source) in enumerate(sequences) if source == row.name]
        assert (row.sequences, row.by_part["document"], row.by_part["thinking"]) == (
            len(of_it),
            sum(document[i] for i in of_it),
            sum(thinking[i] for i in of_it),
        )
    for begin, end, counts in distribution(summary):
        assert counts["thinking"] == sum(begin <= value < end for value in thinking)
        assert counts["document"] == sum(begin <= value < end for value in document)
    assert distribution(summary)[0][:2] == (0, 1)  # two in three think; those that do not have a row of their own
    assert all(sum(counts[name] for _, _, counts in distribution(summary)) == 200 for name in ("whole", "document", "thinking"))


def test_a_length_at_the_end_of_the_last_bin_is_outside_it() -> None:
    assert log_edges(5, 5, 12).tolist() == [5, 6]
    assert log_edges(1, 3, 12).tolist() == [1, 2, 3, 4]
    assert count_in(np.array([1, 2, 3, 3, 4]), np.array([1, 2, 4])) == [1, 3]


def test_facts_sources_and_manifest_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_token_files(tmp_path / "train", [([65], [], f"source-{i:02}" + "x" * 80 * (i == 0)) for i in range(33)])
    text = page(tmp_path / "train")
    for expected in (
        "arm               prepend",
        "stored as         uint16",
        "tokenizer.json, fingerprint ",
        "257 ids",
        "<|endoftext|> (id 256)",
        "3 bad records",
    ):
        assert expected in text
    assert "sidecars          parts.bin, sources.bin, documents.parquet, tokenizer.json, manifest.json" in text
    assert text.count("  source-") == 30
    assert "and 3 more sources" in text
    assert "source-00" + "x" * 50 + "…" in text


def test_no_number_is_cut_short_and_no_line_wrapped_however_narrow(tmp_path: Path) -> None:
    write_token_files(tmp_path / ("train" + "n" * 150), [([65] * 99_999, [66] * 99_999, "web"), ([65], [], None)])
    narrow = page(tmp_path / ("train" + "n" * 150), width=40)
    assert "…" not in narrow
    assert "n" * 150 + "\n" in narrow
    assert "199,999" in narrow


def test_parts_are_told_apart_with_and_without_colours(tmp_path: Path) -> None:
    encode = load_tokenizer("byte", "<|endoftext|>").encode
    write_token_files(tmp_path / "train", [(encode("read\x1b[2J"), encode("hm"), None)])
    plain, coloured = page(tmp_path / "train", documents=1), page(tmp_path / "train", documents=1, coloured=True)
    assert "── 0 (11 tokens)\n⟦hm⟧read\\u{1b}[2J<|endoftext|>\n" in plain
    assert "\x1b" not in plain
    assert "⟦" not in coloured
    assert "\x1b[36mhm\x1b[0mread" in coloured
    assert "\x1b[2m<|endoftext|>" in coloured
    assert "\x1b[2J" not in coloured


def test_an_odd_number_of_tokens_is_cut_with_the_right_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_token_files(tmp_path / "train", [([7] * 1000, [], None)], sidecars=False)
    text = page(tmp_path / "train", documents=1)
    assert "[… 701 tokens …]" in text
    assert text.split("── 0")[1].count("7 ") == 299  # and the end-of-document token, an id like any other without a manifest
    assert "as ids: the dataset has no tokenizer" in text


def test_ids_outside_the_vocabulary_are_noted_not_decoded(tmp_path: Path) -> None:
    write_token_files(tmp_path / "train", [([65, 5000, 66], [], None)])
    assert "[1 ids outside the vocabulary]" in page(tmp_path / "train", documents=1)


def test_a_folder_is_a_table_and_is_verified_whole(tmp_path: Path) -> None:
    for arm in ("prepend", "vanilla"):
        write_token_files(tmp_path / arm / "train", [([65, 66], [67] * (arm == "prepend"), "web")])
    assert "prepend/train" in page(tmp_path) and "vanilla/train" in page(tmp_path)
    assert page(tmp_path, check=True).count(": ok") == 14
    with open(tmp_path / "vanilla/train.bin", "r+b") as file:
        file.write(b"\xff\xff")
    with pytest.raises(DataError, match=r"vanilla/train: 2 finding\(s\)"):
        page(tmp_path, check=True)
    (tmp_path / "prepend/train.manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"prepend/train, .*vanilla/train: 3 finding\(s\)"):
        page(tmp_path, check=True)


def test_a_folder_named_by_a_dot_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_token_files(tmp_path / "train", [([65], [], None)])
    monkeypatch.chdir(tmp_path)
    assert "tokens a sequence" not in page(Path("."))
    (tmp_path / "train").mkdir()  # a folder of the prefix's name does not hide the dataset
    assert "tokens a sequence" in page(Path("train"))


def test_without_a_manifest_verify_says_what_it_cannot_check(tmp_path: Path) -> None:
    write_token_files(tmp_path / "train", [([65], [], None)], sidecars=False)
    assert "no manifest: ids, parts and counts cannot be checked" in page(tmp_path / "train", check=True)


@pytest.mark.parametrize("damage", [b"\x01", b"\x09\x00"])
def test_sources_that_do_not_belong_are_one_error(tmp_path: Path, damage: bytes) -> None:
    write_token_files(tmp_path / "train", [([65], [], None)])
    (tmp_path / "train.sources.bin").write_bytes(damage)
    manifest = json.loads((tmp_path / "train.manifest.json").read_text())
    manifest["outputs"] = [entry for entry in manifest["outputs"] if "sources" not in entry["name"]]
    (tmp_path / "train.manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"sources\.bin: .*do not belong together"):
        page(tmp_path / "train")


def test_a_picture_that_cannot_be_drawn_is_refused_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_token_files(tmp_path / "train", [([65], [], None)])
    monkeypatch.setattr(show, "open_dataset", lambda prefix: pytest.fail("read"))
    with pytest.raises(UsageError, match="the ending tells the kind of picture"):
        page(tmp_path / "train", plot=tmp_path / "a.foo")


def test_options_that_do_not_fit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_token_files(tmp_path / "out/train", [([65], [], None)])
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n')
    for path, plot, check, message in (
        ("out/train", "a.foo", False, r"\.png, \.svg, \.pdf"),
        ("out/train", "a.png", True, "one of --plot and --verify"),
        ("out", "a.png", False, "--plot draws one dataset"),
        ("in.jsonl", "a.png", False, "are for token datasets"),
        ("in.jsonl", None, True, "are for token datasets"),
    ):
        with pytest.raises(UsageError, match=message):
            page(tmp_path / path, plot=None if plot is None else tmp_path / plot, check=check)
    assert not list(tmp_path.glob("a.*"))
    monkeypatch.setattr("tpt_megatron.inspection.plot.find_spec", lambda name: None)
    with pytest.raises(MachineError, match=r"tpt-megatron\[report\]"):
        page(tmp_path / "out/train", plot=tmp_path / "a.png")


def test_what_is_neither_is_one_usage_error(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/manifest.json").write_text('{"kind": "checkpoint"}')
    (tmp_path / "notes.txt").write_text("x")
    for name in ("folder", "notes.txt", "missing"):
        with pytest.raises(UsageError, match=r"PREFIX\.bin and PREFIX\.idx.*\.parquet"):
            page(tmp_path / name)


RECORDS = [
    {"id": "a", "text": "first \x1b[2J text", "source": "web", "thoughts": [{"text": "hm", "generator": "g"}, {"text": "hmm", "generator": "h"}]},
    {"id": "b", "text": "x" * 1501, "source": "web"},
    {"id": "c", "text": "third"},
]


def test_record_files_are_counted_and_shown(tmp_path: Path) -> None:
    lines = [json.dumps(record) for record in RECORDS]
    (tmp_path / "1.jsonl").write_text("\n".join([*lines, "", "no json", '{"id": "d"}']) + "\n")
    (tmp_path / "2.jsonl").write_text(lines[2] + "\n")
    text = page(tmp_path, documents=2)
    facts = dict(line.split(maxsplit=1) for line in text.splitlines() if line.startswith(("records ", "thoughts ", "characters ")))
    assert facts == {"records": "4", "thoughts": "2", "characters": f"{14 + 1501 + 5 + 5 + 1:,}"}
    for expected in (
        "with thoughts   1 (25.0%)",
        "of thoughts     5",
        "bad records       2",
        "blank lines       1",
        "1.jsonl:5: not valid JSON",
        "1.jsonl:6: field 'text'",
    ):
        assert expected in text
    assert "first \\u{1b}[2J text\n⟦hm⟧\n⟦hmm⟧\n── 1 (b, web)\n" in text
    assert "[… 501 characters …]" in text
    assert "third" not in text
    assert "files             2 (" in text


def test_an_augment_output_is_its_shards_and_an_unfinished_one_says_so(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "plan.json").write_text("{}")
    shard = tmp_path / "shards/0.jsonl"
    shard.write_text(json.dumps(RECORDS[0]) + "\n")
    with pytest.raises(DataError, match="an unfinished output of tpt augment"):
        page(tmp_path)
    entry = {"name": "shards/0.jsonl", "bytes": shard.stat().st_size, "sha256": ""}
    Manifest(kind="augmented", settings={}, inputs=(), outputs=(FileEntry(**entry),), counts={}).write(tmp_path / "manifest.json")
    assert "records           1\n" in page(tmp_path)


def test_many_sources_of_records_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "SOURCES_COUNTED", 5)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": "t", "source": f"s{i}"}) + "\n" for i in range(20)))
    found = records.count_records(show.locate(tmp_path / "in.jsonl"), 0)
    assert len(found.sources) == 6
    assert found.sources[records.OTHERS] == 15


def test_records_are_read_from_a_url_and_from_parquet() -> None:
    import fsspec
    import pyarrow as pa
    import pyarrow.parquet as pq

    store = fsspec.filesystem("memory")
    with store.open("memory://inspected/in.parquet", "wb") as file:
        pq.write_table(pa.table({"text": ["one", "two"], "source": ["web", None]}), file)
    assert "records           2\n" in page("memory://inspected/in.parquet")
    assert "records           2\n" in page("memory://inspected")


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, tpt_megatron.inspection.show; print([m for m in ('torch', 'transformers', 'megatron', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
