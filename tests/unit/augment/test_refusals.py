"""What augment refuses before it writes anything, or says at the end."""

import json
from pathlib import Path

import pytest

from tpt_megatron.augment.runner import run_augment
from tpt_megatron.config.augment import AugmentConfig
from tpt_megatron.config.load import check_config
from tpt_megatron.errors import ConfigError, DataError


def config(source: Path, output: Path, field: str = "answer") -> AugmentConfig:
    return check_config(AugmentConfig, {"input": str(source), "output": str(output), "generator": {"kind": "field", "field": field}}, "c")


def write(path: Path, **record: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record) + "\n")
    return path


def test_another_input_does_not_overwrite_what_the_first_gave(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.jsonl", text="a", answer="x"), write(tmp_path / "b.jsonl", text="b", answer="y")
    run_augment(config(first, tmp_path / "out"))
    (shard,) = (tmp_path / "out/shards").glob("00000-*")
    before = shard.read_bytes()
    with pytest.raises(ConfigError, match=r"was made from 1 other input.* \(see .*a\.jsonl\)"):
        run_augment(config(second, tmp_path / "out"))
    assert shard.read_bytes() == before


@pytest.mark.parametrize("output", ["in", "."])
def test_an_input_that_lies_in_the_output_is_refused(tmp_path: Path, output: str) -> None:
    write(tmp_path / "in/a.jsonl", text="a", answer="x")
    with pytest.raises(ConfigError, match="lies in output="):
        run_augment(config(tmp_path / "in", tmp_path / output))


def test_no_usable_record_at_all_is_an_error_and_leaves_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none of the 1 lines"):
        run_augment(config(write(tmp_path / "a.jsonl", text="a"), tmp_path / "out"))
    assert not (tmp_path / "out/manifest.json").exists()


def test_a_file_that_is_no_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"a\.parquet: not a whole Parquet file"):
        run_augment(config(tmp_path / "a.parquet", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text")
    with pytest.raises(DataError, match=r"a\.csv: not a record file by its name"):
        run_augment(config(tmp_path / "a.csv", tmp_path / "out"))


def test_a_model_without_a_tokenizer_cannot_count_tokens(tmp_path: Path) -> None:
    given = {"input": "a", "output": "b", "generator": {"kind": "openai", "model": "m", "base_urls": "http://x/v1"}}
    with pytest.raises(ConfigError, match=r"generator m: tokenizer is missing.*or document_tokens=null"):
        check_config(AugmentConfig, given, "c")


@pytest.mark.parametrize(("change", "reason"), [({"base_urls": []}, "give either base_urls"), ({"base_urls": "host:80"}, "is no URL")])
def test_an_openai_generator_needs_a_server(change: dict[str, object], reason: str) -> None:
    given = {"input": "a", "output": "b", "document_tokens": None, "generator": {"kind": "openai", "model": "m", "base_urls": "http://x/v1"} | change}
    with pytest.raises(ConfigError, match=reason):
        check_config(AugmentConfig, given, "c")


def test_the_text_cannot_be_its_own_thought(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"generator\.field='text' is already"):
        config(tmp_path / "a.jsonl", tmp_path / "out", field="text")


def test_a_field_named_like_one_of_ours_can_hold_the_thought(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", question="q", text="t")
    chosen = {
        "input": str(source),
        "output": str(tmp_path / "out"),
        "fields": {"text": "question"},
        "format": "jsonl",
        "generator": {"kind": "field", "field": "text"},
    }
    run_augment(check_config(AugmentConfig, chosen, "c"))
    (shard,) = (tmp_path / "out/shards").glob("00000-*")
    assert json.loads(shard.read_text())["thoughts"][0]["text"] == "t"
