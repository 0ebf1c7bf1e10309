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
    before = (tmp_path / "out/shards/00000.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"was made from .*a\.jsonl, not .*b\.jsonl"):
        run_augment(config(second, tmp_path / "out"))
    assert (tmp_path / "out/shards/00000.jsonl").read_bytes() == before


@pytest.mark.parametrize("output", ["in", "."])
def test_an_input_that_lies_in_the_output_is_refused(tmp_path: Path, output: str) -> None:
    write(tmp_path / "in/a.jsonl", text="a", answer="x")
    with pytest.raises(ConfigError, match="lies in output="):
        run_augment(config(tmp_path / "in", tmp_path / output))


def test_no_usable_record_at_all_is_an_error_and_leaves_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none of the 1 lines"):
        run_augment(config(write(tmp_path / "a.jsonl", text="a"), tmp_path / "out"))
    assert not (tmp_path / "out/manifest.json").exists()


def test_parquet_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="Parquet input is not supported yet"):
        run_augment(config(tmp_path / "a.parquet", tmp_path / "out"))


def test_the_text_cannot_be_its_own_thought(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"generator\.field='text' is already"):
        config(tmp_path / "a.jsonl", tmp_path / "out", field="text")


def test_a_field_named_like_one_of_ours_can_hold_the_thought(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", question="q", text="t")
    chosen = {"input": str(source), "output": str(tmp_path / "out"), "fields": {"text": "question"}, "generator": {"kind": "field", "field": "text"}}
    run_augment(check_config(AugmentConfig, chosen, "c"))
    assert json.loads((tmp_path / "out/shards/00000.jsonl").read_text())["thoughts"][0]["text"] == "t"
