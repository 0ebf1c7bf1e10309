from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from tpt_megatron.augment import shards
from tpt_megatron.augment.generators import Ingredients
from tpt_megatron.augment.plan import make_or_read_plan
from tpt_megatron.augment.runner import run_augment
from tpt_megatron.augment.worker import Worker
from tpt_megatron.bad_records import BadRecords, LineCounts, read_records
from tpt_megatron.config.augment import AugmentConfig
from tpt_megatron.errors import ConfigError, DataError
from tpt_megatron.files import check_outputs, read_lines, read_manifest
from tpt_megatron.record_files import expand_inputs
from tpt_megatron.records import AugmentedDocument, read_augmented
from tpt_megatron.storage import locate


def write(path: Path, *records: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def config(folder: Path, **changes: Any) -> AugmentConfig:
    values = {"input": str(folder / "in"), "output": folder / "out", "generator": {"kind": "field", "field": "mind"}} | changes
    return AugmentConfig.model_validate(values)


def two_inputs(folder: Path) -> None:
    write(folder / "in/b.jsonl", {"text": "two", "mind": "2"}, {"text": "three", "mind": "3", "thoughts": [{"text": "old", "generator": "before"}]})
    write(folder / "in/a.jsonl", {"id": "one", "text": "one", "mind": "1", "source": "s", "url": {"k": [1, None]}})


def read_output(folder: Path) -> list[AugmentedDocument]:
    read = []
    for place in expand_inputs((str(folder),)):
        read += list(read_records(place, read_augmented, BadRecords("fail"), LineCounts()))
    return read


def data_files(folder: Path) -> dict[str, bytes]:
    """What is in an output, without the shards' times."""
    kept = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix not in (".json", ".html"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


@pytest.mark.parametrize("output_format", ["parquet", "jsonl", "jsonl.zst"])
def test_documents_come_out_untouched_in_order_whatever_the_format(tmp_path: Path, output_format: str) -> None:
    two_inputs(tmp_path)
    manifest = run_augment(config(tmp_path, format=output_format))
    assert manifest is not None
    assert manifest == read_manifest(tmp_path / "out/manifest.json", "augmented")
    assert manifest.counts == {
        "documents": 3,
        "thoughts": 4,
        "rejected_thoughts": 0,
        "documents_without_thoughts": 0,
        "bad_records": 0,
        "blank_lines": 0,
        "lines_read": 3,
    }
    check_outputs(manifest, tmp_path / "out", checksums=True)
    assert [entry.name.split("-")[0] for entry in manifest.outputs] == ["shards/00000", "shards/00001"]
    one, two, three = read_output(tmp_path / "out")
    assert (one.document.id, one.document.text, one.document.source) == ("one", "one", "s")
    assert one.document.extra == {"mind": "1", "url": {"k": [1, None]}}
    assert [(thought.text, thought.generator) for thought in one.thoughts] == [("1", "field:mind")]
    assert (two.document.text, [thought.text for thought in three.thoughts]) == ("two", ["old", "3"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["manifest.json", "plan.json", "report.html", "shards"]


texts = st.text(st.characters(exclude_categories=("Cs",)), min_size=1).filter(lambda text: text.strip() != "")


@pytest.mark.parametrize("output_format", ["parquet", "jsonl.zst"])
@settings(max_examples=10)
@given(written=st.lists(texts, min_size=1, max_size=100))
def test_text_and_thought_come_out_byte_for_byte(tmp_path_factory: pytest.TempPathFactory, output_format: str, written: list[str]) -> None:
    folder = tmp_path_factory.mktemp("text")
    write(folder / "in/a.jsonl", *({"text": text, "mind": text, "source": text} for text in written))
    run_augment(config(folder, format=output_format, checks={"delimiters": [], "max_repeated": None, "max_copied": None, "refusals": []}))
    for text, record in zip(written, read_output(folder / "out"), strict=True):
        assert record.document.text.encode() == record.thoughts[0].text.encode() == text.encode()
        assert record.document.extra["mind"] == record.document.source == text


def test_parquet_in_keeps_text_and_every_field(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    rows = [{"text": f"document {i}", "mind": "m", "score": i / 7, "tags": ["a", None], "meta": {"n": i}} for i in range(1000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in/a.parquet", row_group_size=300)
    manifest = run_augment(config(tmp_path, shard={"documents": 70}))
    assert manifest is not None
    assert (manifest.counts["documents"], manifest.details["shards"]) == (1000, 5 * 3 + 2)
    read = read_output(tmp_path / "out")
    assert [record.document.text for record in read] == [row["text"] for row in rows]
    assert [dict(record.document.extra) for record in read] == [{key: value for key, value in row.items() if key != "text"} for row in rows]


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_shards_cut_a_file_anywhere_and_lose_nothing(tmp_path: Path, ending: str) -> None:
    lines = b"".join(b'{"text": "document %d", "mind": "m"}\r\n\n' % i for i in range(500))
    (tmp_path / "in").mkdir()
    pack = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.zst": zstandard.compress}[ending]
    (tmp_path / f"in/a.{ending}").write_bytes(pack(b"\xef\xbb\xbf" + lines))
    manifest = run_augment(config(tmp_path, shard={"documents": 37}))
    assert manifest is not None
    assert (manifest.counts["documents"], manifest.counts["blank_lines"], manifest.counts["lines_read"]) == (500, 500, 1000)
    assert [record.document.text for record in read_output(tmp_path / "out")] == [f"document {i}" for i in range(500)]
    small = run_augment(config(tmp_path, output=tmp_path / "small", shard={"megabytes": 0.001}))
    assert small is not None
    assert small.details["shards"] > 15
    assert [record.document.text for record in read_output(tmp_path / "small")] == [f"document {i}" for i in range(500)]


def test_a_bad_record_in_the_middle_of_a_file_has_its_own_line_number(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_bytes(b'{"text": "good", "mind": "m"}\n' * 57 + b"{\n" + b'{"text": "good", "mind": "m"}\n' * 30)
    run_augment(config(tmp_path, shard={"documents": 10}))
    (bad,) = (tmp_path / "out/bad").iterdir()
    assert json.loads(bad.read_text())["where"] == f"{tmp_path}/in/a.jsonl:58"


def test_a_rerun_keeps_finished_shards_untouched_and_makes_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two_inputs(tmp_path)
    run_augment(config(tmp_path))
    before = data_files(tmp_path / "out")
    kept = next((tmp_path / "out/shards").glob("00000-*")).stat()
    for name in ("manifest.json", "shards/00001.manifest.json"):
        (tmp_path / "out" / name).unlink()
    written = []
    original = shards.ShardWriter.commit
    monkeypatch.setattr(shards.ShardWriter, "commit", lambda self, opened: written.append(opened.shard.number) or original(self, opened))
    run_augment(config(tmp_path))
    assert written == [1]
    assert data_files(tmp_path / "out") == before
    after = next((tmp_path / "out/shards").glob("00000-*")).stat()
    assert (after.st_ino, after.st_mtime_ns) == (kept.st_ino, kept.st_mtime_ns)


def test_a_cut_off_shard_is_made_again(tmp_path: Path) -> None:
    two_inputs(tmp_path)
    run_augment(config(tmp_path))
    before = data_files(tmp_path / "out")
    shard = next((tmp_path / "out/shards").glob("00000-*"))
    shard.write_bytes(shard.read_bytes()[:-10])
    assert run_augment(config(tmp_path)) is not None
    assert data_files(tmp_path / "out") == before


@pytest.mark.parametrize("damage", [b"", b'{"kind": "augm', b"[]"])
def test_a_damaged_manifest_of_a_shard_has_it_made_again(tmp_path: Path, damage: bytes) -> None:
    two_inputs(tmp_path)
    run_augment(config(tmp_path))
    before = data_files(tmp_path / "out")
    (tmp_path / "out/manifest.json").unlink()
    (tmp_path / "out/shards/00000.manifest.json").write_bytes(damage)
    assert run_augment(config(tmp_path)) is not None
    assert data_files(tmp_path / "out") == before


def test_what_is_for_reading_can_be_cleared_without_making_shards_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "in/a.jsonl", {"text": "one", "mind": "fine"}, {"text": "two", "mind": "a <think> inside"}, {"text": 3})
    first = run_augment(config(tmp_path))
    for folder in ("rejected", "bad"):
        shutil.rmtree(tmp_path / "out" / folder)
    monkeypatch.setattr(shards.ShardWriter, "commit", lambda *_: pytest.fail("a finished shard was made again"))
    assert run_augment(config(tmp_path)) == first
    (tmp_path / "out/manifest.json").unlink()
    again = run_augment(config(tmp_path))
    assert again is not None
    assert first is not None
    assert again.counts == first.counts


def test_one_file_by_two_names_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    manifest = run_augment(config(tmp_path, input=["in/a.jsonl", str(tmp_path / "in/a.jsonl"), "in/../in/a.jsonl"]))
    assert manifest is not None
    assert manifest.counts["documents"] == 1


def test_a_plan_that_was_made_anew_while_a_worker_got_ready_is_not_worked_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker may wait long for its server. Another command on the same output, with more input by then, must not mix with it."""
    two_inputs(tmp_path)
    original = Worker._open_generators

    async def slowly(self: Worker) -> None:
        monkeypatch.setattr(Worker, "_open_generators", original)
        write(tmp_path / "in/c.jsonl", {"text": "more", "mind": "m"})
        later = config(tmp_path)
        make_or_read_plan(later, Ingredients.of(later).settings(), locate(later.output))
        await original(self)

    monkeypatch.setattr(Worker, "_open_generators", slowly)
    with pytest.raises(ConfigError, match="was planned anew by another command meanwhile"):
        run_augment(config(tmp_path))
    manifest = run_augment(config(tmp_path))
    assert manifest is not None
    assert manifest.counts["documents"] == 4


def test_shards_of_another_plan_are_never_taken_for_this_ones(tmp_path: Path) -> None:
    two_inputs(tmp_path)
    run_augment(config(tmp_path))
    (tmp_path / "out/manifest.json").unlink()
    path = tmp_path / "out/shards/00001.manifest.json"
    path.write_text(path.read_text().replace('"plan": "', '"plan": "0'))
    with pytest.raises(DataError, match=r"shard 00001 and 0 more were made by another plan"):
        run_augment(config(tmp_path))


def test_an_output_of_other_settings_or_inputs_is_refused(tmp_path: Path) -> None:
    two_inputs(tmp_path)
    run_augment(config(tmp_path))
    before = data_files(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"other settings \(generator: .*\"mind\".*, now .*\"other\".*; give another output"):
        run_augment(config(tmp_path, generator={"kind": "field", "field": "other"}))
    with pytest.raises(ConfigError, match=r"was made from 2 other input\(s\) than the 1 given now"):
        run_augment(config(tmp_path, input=str(tmp_path / "in/a.jsonl")))
    write(tmp_path / "in/b.jsonl", {"text": "new", "mind": "m"})
    with pytest.raises(DataError, match=r"b\.jsonl: has changed since output="):
        run_augment(config(tmp_path))
    assert data_files(tmp_path / "out") == before


def test_an_input_that_was_only_copied_anew_is_still_the_same(tmp_path: Path) -> None:
    two_inputs(tmp_path)
    first = run_augment(config(tmp_path))
    two_inputs(tmp_path)
    assert run_augment(config(tmp_path)) == first


def test_a_plan_by_which_nothing_was_done_gives_way_to_other_settings(tmp_path: Path) -> None:
    two_inputs(tmp_path)
    run_augment(config(tmp_path))
    plan = (tmp_path / "out/plan.json").read_bytes()
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    (fresh / "plan.json").write_bytes(plan)
    manifest = run_augment(config(tmp_path, output=fresh, shard={"documents": 1}))
    assert manifest is not None
    assert manifest.details["shards"] == 3


def test_where_servers_stand_is_no_setting_that_thoughts_depend_on(tmp_path: Path) -> None:
    def identity(**changes: Any) -> dict[str, Any]:
        generator = {"kind": "openai", "model": "m", "base_urls": "http://a/v1"} | changes
        return config(tmp_path, generator=generator, document_tokens=None).identity()

    assert identity() == identity(base_urls=["http://b/v1", "http://c/v1"], timeout_s=5, api_key_env="OTHER", concurrency={"initial": 2, "maximum": 3})
    assert identity() != identity(sampling={"temperature": 0.7})
    assert identity() != identity(revision="abc")


def test_thoughts_that_the_checks_refuse_are_counted_and_kept_aside(tmp_path: Path) -> None:
    write(tmp_path / "in/a.jsonl", {"text": "one", "mind": "fine"}, {"text": "two", "mind": "a <think> inside"})
    manifest = run_augment(config(tmp_path, format="jsonl"))
    assert manifest is not None
    assert (manifest.counts["thoughts"], manifest.counts["rejected_thoughts"], manifest.counts["documents_without_thoughts"]) == (1, 1, 1)
    assert manifest.details["statistics"]["rejections"] == {"delimiter": {"field:mind": 1}}
    assert [len(record.thoughts) for record in read_output(tmp_path / "out")] == [1, 0]
    (rejected,) = (json.loads(line) for _, line in read_lines(next((tmp_path / "out/rejected").iterdir())))
    assert (rejected["reason"], rejected["thought"]["text"]) == ("delimiter", "a <think> inside")
    manifest = run_augment(config(tmp_path, output=tmp_path / "none", keep_rejected=False))
    assert manifest is not None
    assert manifest.counts["rejected_thoughts"] == 1
    assert not (tmp_path / "none/rejected").exists()


def test_several_processes_give_what_one_gives(tmp_path: Path) -> None:
    write(tmp_path / "in/a.jsonl", *({"text": f"document {i}", "mind": "m"} for i in range(300)))
    one = run_augment(config(tmp_path, shard={"documents": 20}))
    two = run_augment(config(tmp_path, output=tmp_path / "two", shard={"documents": 20}, workers=2))
    assert one is not None
    assert two is not None
    assert one.counts == two.counts
    assert data_files(tmp_path / "out") == data_files(tmp_path / "two")
