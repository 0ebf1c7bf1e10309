from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpt_megatron.augment import runner
from tpt_megatron.augment.runner import run_augment
from tpt_megatron.config.augment import AugmentConfig
from tpt_megatron.errors import ConfigError
from tpt_megatron.files import check_outputs, expand_inputs, read_lines, read_manifest


def write(path: Path, *records: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def config(folder: Path, **changes: Any) -> AugmentConfig:
    settings = {"input": str(folder / "in"), "output": folder / "out", "generator": {"kind": "field", "field": "mind"}} | changes
    return AugmentConfig.model_validate(settings)


def two_inputs(folder: Path) -> None:
    write(folder / "in/b.jsonl", {"text": "two", "mind": "2"}, {"text": "three", "mind": "3", "thoughts": [{"text": "old", "generator": "before"}]})
    write(folder / "in/a.jsonl", {"id": "one", "text": "one", "mind": "1", "source": "s", "url": {"k": [1, None]}})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_each_input_becomes_a_shard_and_the_source_record_is_untouched(tmp_path: Path) -> None:
    two_inputs(tmp_path)
    manifest = run_augment(config(tmp_path))
    assert manifest.counts == {"documents": 3, "thoughts": 4, "bad_records": 0, "blank_lines": 0, "lines_read": 3}
    assert manifest == read_manifest(tmp_path / "out/manifest.json", "augmented")
    check_outputs(manifest, tmp_path / "out", checksums=True)
    shards = expand_inputs((str(tmp_path / "out"),))
    assert [shard.name for shard in shards] == ["00000.jsonl", "00001.jsonl"]
    (first,) = (json.loads(line) for _, line in read_lines(shards[0]))
    assert first == {"id": "one", "text": "one", "source": "s", "mind": "1", "url": {"k": [1, None]}, "thoughts": [{"text": "1", "generator": "field:mind"}]}
    assert [thought["text"] for thought in json.loads(shards[1].read_text().splitlines()[1])["thoughts"]] == ["old", "3"]
    assert set(contents(tmp_path / "out")) == {
        "manifest.json",
        *(f"shards/0000{number}.{ending}" for number in (0, 1) for ending in ("jsonl", "manifest.json")),
    }


@given(st.text(st.characters(exclude_categories=("Cs",)), min_size=1).filter(lambda text: text.strip() != ""))
def test_text_and_thought_come_out_byte_for_byte(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.mktemp("text")
    write(folder / "in/a.jsonl", {"text": text, "mind": text})
    run_augment(config(folder))
    record = json.loads((folder / "out/shards/00000.jsonl").read_text(encoding="utf-8"))
    assert record["text"] == record["mind"] == record["thoughts"][0]["text"] == text


def test_a_rerun_keeps_finished_shards_untouched_and_makes_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two_inputs(tmp_path)
    run_augment(config(tmp_path))
    before = contents(tmp_path / "out")
    kept = (tmp_path / "out/shards/00000.jsonl").stat()
    for name in ("manifest.json", "shards/00001.manifest.json"):
        (tmp_path / "out" / name).unlink()
    written = []
    original = runner._write_shard
    monkeypatch.setattr(runner, "_write_shard", lambda *arguments: written.append(arguments[4]) or original(*arguments))
    run_augment(config(tmp_path))
    assert written == [1]
    assert contents(tmp_path / "out") == before
    after = (tmp_path / "out/shards/00000.jsonl").stat()
    assert (after.st_ino, after.st_mtime_ns) == (kept.st_ino, kept.st_mtime_ns)


def test_a_damaged_shard_and_a_changed_input_are_made_again(tmp_path: Path) -> None:
    two_inputs(tmp_path)
    run_augment(config(tmp_path))
    before = contents(tmp_path / "out")
    (tmp_path / "out/shards/00000.jsonl").write_bytes(before["shards/00000.jsonl"].replace(b"one", b"eno"))
    run_augment(config(tmp_path))
    assert contents(tmp_path / "out") == before
    write(tmp_path / "in/b.jsonl", {"text": "new", "mind": "m"})
    assert run_augment(config(tmp_path)).counts["documents"] == 2
    assert b'"new"' in (tmp_path / "out/shards/00001.jsonl").read_bytes()


def test_an_output_of_other_settings_or_of_more_inputs_is_refused(tmp_path: Path) -> None:
    two_inputs(tmp_path)
    run_augment(config(tmp_path))
    before = contents(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"other settings .*; give another output, or remove the folder"):
        run_augment(config(tmp_path, generator={"kind": "field", "field": "other"}))
    with pytest.raises(ConfigError, match="more inputs than the 1 given now"):
        run_augment(config(tmp_path, input=str(tmp_path / "in/a.jsonl")))
    assert contents(tmp_path / "out") == before
