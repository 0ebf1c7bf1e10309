from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import orjson
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from transformers import LlamaForCausalLM

from tests.support.byte_model import make_byte_model
from tpt_megatron.config.value import ValueConfig
from tpt_megatron.errors import ConfigError, DataError, RecordError
from tpt_megatron.evaluate.value_report import value_tables
from tpt_megatron.evaluate.value_runner import run_value
from tpt_megatron.record_files import encode_records, expand_inputs, read_rows
from tpt_megatron.records import AugmentedDocument, Document, Thought
from tpt_megatron.storage import locate

BLOCK = "\n<think>\n{}\n</think>\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_byte_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def bigram(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_byte_model(tmp_path_factory.mktemp("bigram"), is_bigram=True)


def documents(count: int = 6, first: int = 0) -> list[AugmentedDocument]:
    """Return documents with 0 to 2 thoughts that saw half of them."""
    made = []
    for number in range(first, first + count):
        text = f"document {number} says {'it ' * (number % 5)}and ends"
        thoughts = tuple(Thought(f"{i} is {number}", "g", seen_end=len(text) // 2, tokens=7, extra={"kept": [i]}) for i in range(number % 3))
        made.append(AugmentedDocument(Document(f"d{number}", text, f"s{number % 2}" if number % 4 else None, {"level": number}), thoughts))
    return made


def write(folder: Path) -> None:
    (folder / "in").mkdir()
    (folder / "in/a.jsonl").write_bytes(encode_records(documents(), "jsonl") + b"\n{broken\n")
    (folder / "in/b.parquet").write_bytes(encode_records(documents(7, 6), "parquet"))
    (folder / "in/c.jsonl.zst").write_bytes(encode_records(documents(3, 13), "jsonl.zst"))


def config(folder: Path, model: Path, output: str = "out", **changes: Any) -> ValueConfig:
    return ValueConfig.model_validate(
        {"input": str(folder / "in"), "output": output if "://" in output else str(folder / output), "model": model, "device": "cpu"} | changes
    )


def records(output: Path) -> list[dict[str, Any]]:
    return [row.parse() for place in expand_inputs((str(output),)) for row in read_rows(place)]


def likelihood(model: LlamaForCausalLM, text: str, target: str) -> float:
    """Return log p(target | what is before it in the text), byte by byte."""
    # The tokenizer's ids of bytes: the byte-level alphabet in its own order.
    alphabet = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in alphabet} | {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in alphabet)}
    order = {letter: i for i, letter in enumerate(sorted(letters.values()))}
    ids = torch.tensor([order[letters[byte]] for byte in text.encode()])
    with torch.no_grad():
        logits = model(ids[None]).logits[0].double()
    count = len(target.encode())
    return sum(float(torch.log_softmax(logits[at - 1], 0)[ids[at]]) for at in range(len(ids) - count, len(ids)))


def test_values_are_what_transformers_says_and_all_else_is_kept(tmp_path: Path, model: Path) -> None:
    write(tmp_path)
    summary = run_value(config(tmp_path, model, batch_tokens=300))
    assert summary is not None
    reference = LlamaForCausalLM.from_pretrained(model)
    given = [orjson.loads(line) for line in encode_records(documents(16), "jsonl").splitlines()]
    found = records(tmp_path / "out")
    values = []
    for before, after in zip(given, found, strict=True):
        for thought in after["thoughts"]:
            score, seen = thought.pop("value"), before["text"][: thought["seen_end"]]
            target = before["text"][len(seen) :]
            expected = likelihood(reference, seen + BLOCK.format(thought["text"]) + target, target) - likelihood(reference, before["text"], target)
            assert score["nats"] == pytest.approx(expected, abs=1e-3)
            assert score["nats_per_token"] == pytest.approx(expected / len(target), abs=1e-4)
            assert (score["target"], score["target_tokens"]) == ("continuation", len(target))
            assert score["nats"] == pytest.approx(score["log_likelihood"] - score["log_likelihood_without"])
            assert score["model"] == summary["settings"]["model"]
            values.append(score["nats"])
        assert before == after
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == ["bad", "manifest.json", "plan.json", "shards", "summary.json"]
    names = sorted(path.name for path in (tmp_path / "out/shards").iterdir() if not path.name.endswith(".manifest.json"))
    assert names == ["00000.jsonl", "00001.parquet", "00002.jsonl.zst"]
    assert json.loads((tmp_path / "out/bad/00000.jsonl").read_text())["where"].endswith("a.jsonl:8")
    counts = summary["counts"]
    assert [counts[name] for name in ("lines_read", "blank_lines", "bad_records", "documents", "thoughts", "thoughts_with_value")] == [18, 1, 1, 16, 15, 15]
    assert summary["all"]["mean_nats"] == pytest.approx(sum(values) / len(values))
    assert summary["all"]["helping"] == sum(value > 0 for value in values) / len(values)
    assert {name: of["thoughts"] for name, of in summary["by_source"].items()} == {"(none)": 3, "s0": 5, "s1": 7}
    assert json.loads((tmp_path / "out/summary.json").read_text()) == summary


def test_of_a_bigram_model_the_value_is_that_of_the_byte_before_the_target(tmp_path: Path, bigram: Path) -> None:
    """By hand: only the target's first byte can be changed by what is before it, and before it stands the line end in place of `t`."""
    write(tmp_path)
    augmented = AugmentedDocument(Document("d", "what next", None), (Thought("any", "g", seen_end=4),))
    (tmp_path / "in/a.jsonl").write_bytes(encode_records([augmented], "jsonl"))
    run_value(config(tmp_path, bigram, input=str(tmp_path / "in/a.jsonl")))
    reference = LlamaForCausalLM.from_pretrained(bigram)
    (record,) = records(tmp_path / "out")
    expected = likelihood(reference, "\n ", " ") - likelihood(reference, "t ", " ")
    assert record["thoughts"][0]["value"]["nats"] == pytest.approx(expected, abs=1e-4)
    assert abs(expected) > 0.01


def test_batches_change_no_value(tmp_path: Path, model: Path) -> None:
    write(tmp_path)
    found = []
    for number, room in enumerate((1, 200, 100_000)):
        run_value(config(tmp_path, model, str(number), batch_tokens=room))
        found.append([thought["value"]["nats"] for record in records(tmp_path / str(number)) for thought in record["thoughts"]])
    assert found[0] == pytest.approx(found[1], abs=1e-4)
    assert found[0] == pytest.approx(found[2], abs=1e-4)
    run_value(config(tmp_path, model, "rough", dtype="bfloat16"))
    rough = [thought["value"]["nats"] for record in records(tmp_path / "rough") for thought in record["thoughts"]]
    assert max(abs(one - other) for one, other in zip(found[0], rough, strict=True)) < 5


def test_thoughts_without_a_value_have_a_reason_and_are_counted(tmp_path: Path, model: Path) -> None:
    (tmp_path / "in").mkdir()
    text = "a" * 100
    thoughts = [
        Thought("all", "g", seen_end=100),
        Thought("long " * 60, "g", seen_end=50),
        Thought("cut" * 40, "g", seen_end=90),
        Thought("fits", "g", seen_end=50),
    ]
    (tmp_path / "in/a.jsonl").write_bytes(encode_records([AugmentedDocument(Document("d", text, "[web]"), tuple(thoughts))], "jsonl"))
    summary = run_value(config(tmp_path, model, longest=200))
    assert summary is not None
    scores = [thought["value"] for thought in records(tmp_path / "out")[0]["thoughts"]]
    assert [score.get("reason") for score in scores] == ["nothing_follows", "too_long", None, None]
    assert scores[0]["nats"] is scores[0]["nats_per_token"] is None
    assert "context_tokens_cut" in scores[2]
    assert not [name for name in scores[3] if name.endswith("_cut")]
    assert summary["without_value"] == {"nothing_follows": 1, "too_long": 1}
    assert (summary["counts"]["contexts_cut"], summary["counts"]["targets_cut"], summary["counts"]["thoughts_without_value"]) == (1, 0, 2)
    console = Console(width=200, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        for part in value_tables(summary):
            console.print(part)
        said = console.export_text()
    assert "[web]" in said
    assert "1 without a value: nothing of the document follows what they saw" in said
    assert "1 whose context's beginning was left out" in said


def test_what_saw_its_target_is_marked(tmp_path: Path, model: Path) -> None:
    (tmp_path / "in").mkdir()
    saw, did_not = Thought("it is 4", "g", seen_end=13), Thought("hm", "g", seen_end=5)
    (tmp_path / "in/a.jsonl").write_bytes(encode_records([AugmentedDocument(Document("d", "2 + 2 #### 4."), (saw, did_not))], "jsonl"))
    summary = run_value(config(tmp_path, model, target="answer", answer={"delimiter": "#### "}))
    assert summary is not None
    scores = [thought["value"] for thought in records(tmp_path / "out")[0]["thoughts"]]
    assert [score.get("saw_target", False) for score in scores] == [True, False]
    assert [score["target_tokens"] for score in scores] == [2, 2]
    assert "1 had seen what they are valued on" in "".join(str(part) for part in value_tables(summary))


def test_a_model_without_finite_numbers_is_no_value(tmp_path: Path, model: Path) -> None:
    broken = LlamaForCausalLM.from_pretrained(model)
    with torch.no_grad():
        broken.lm_head.weight[0] = math.nan
    broken.save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).write_bytes((model / name).read_bytes())
    write(tmp_path)
    summary = run_value(config(tmp_path, tmp_path / "model"))
    assert summary is not None
    assert summary["without_value"] == {"not_finite": 15}
    assert summary["all"] == {"thoughts": 0}


def test_parts_of_the_work_complete_the_output_together(tmp_path: Path, model: Path) -> None:
    write(tmp_path)
    run_value(config(tmp_path, model, "whole"))
    for shard in ("2/2", "1/2"):
        ended = run_value(config(tmp_path, model, shard=shard))
        assert (ended is None) == (shard == "2/2")
        if ended is None:
            with pytest.raises(DataError, match="an unfinished output of tpt augment or tpt value"):
                expand_inputs((str(tmp_path / "out"),))
    for path in (tmp_path / "whole").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "out" / path.relative_to(tmp_path / "whole")).read_bytes(), path


def test_damaged_shards_are_made_again_and_others_kept(tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path)
    first = run_value(config(tmp_path, model))
    stamps = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out/shards").iterdir()}
    shard = tmp_path / "out/shards/00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert run_value(config(tmp_path, model)) == first
    pq.read_table(shard)
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out/shards").iterdir()}
    assert {name for name in after if after[name] != stamps[name]} == {"00001.parquet", "00001.manifest.json"}
    (tmp_path / "out/shards/.00002.jsonl.zst.0.tmp").write_text("left by a killed run")
    assert run_value(config(tmp_path, model)) == first
    assert not (tmp_path / "out/shards/.00002.jsonl.zst.0.tmp").exists()


def test_mistakes_are_one_line(tmp_path: Path, model: Path, bigram: Path) -> None:
    write(tmp_path)
    with pytest.raises(RecordError, match=r"a\.jsonl:8: not valid JSON"):
        run_value(config(tmp_path, model, on_bad_record="fail"))
    run_value(config(tmp_path, model))
    with pytest.raises(ConfigError, match=r"holds values of other settings \(target: \"continuation\", now \"document\"\)"):
        run_value(config(tmp_path, model, target="document"))
    with pytest.raises(ConfigError, match=r"holds values of other settings \(model: "):
        run_value(config(tmp_path, bigram))
    with pytest.raises(ConfigError, match=r"was begun with other inputs \(3, now 1\)"):
        run_value(config(tmp_path, model, input=str(tmp_path / "in/a.jsonl")))
    with pytest.raises(DataError, match="1 bad records of it were set aside"):
        run_value(config(tmp_path, model, on_bad_record="fail"))
    with pytest.raises(DataError, match="a thought has a field 'value' already; name another with field=NAME"):
        run_value(config(tmp_path, bigram, "again", input=str(tmp_path / "out")))
    assert run_value(config(tmp_path, bigram, "both", input=str(tmp_path / "out"), field="value_bigram")) is not None
    assert {"value", "value_bigram"} <= records(tmp_path / "both")[1]["thoughts"][0].keys()
    with pytest.raises(ConfigError, match="lies in output"):
        run_value(config(tmp_path, model, input=str(tmp_path / "out/shards/00000.jsonl")))
    (tmp_path / "in/c.jsonl.zst").write_bytes(encode_records(documents(2), "jsonl.zst"))
    with pytest.raises(DataError, match=r"c\.jsonl\.zst: has changed since output=.* was begun"):
        run_value(config(tmp_path, model))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/plan.json").write_text('{"plan_version": 1}')
    with pytest.raises(ConfigError, match="holds an output of another stage"):
        run_value(config(tmp_path, model, "other"))
    assert not list((tmp_path / "other").glob(".scratch*"))


def test_an_output_may_be_remote(tmp_path: Path, model: Path) -> None:
    write(tmp_path)
    run_value(config(tmp_path, model, "local"))
    assert run_value(config(tmp_path, model, output="memory://value/out", input=str(tmp_path / "in"))) is not None
    remote = [row.parse() for place in expand_inputs(("memory://value/out",)) for row in read_rows(place)]
    assert remote == records(tmp_path / "local")
    assert locate("memory://value/out/summary.json").is_file()
