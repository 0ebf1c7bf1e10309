from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tokenizers
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tpt_megatron import files
from tpt_megatron.config.preprocess import PreprocessConfig
from tpt_megatron.datasets import PART_DOCUMENT, TokenDataset, open_dataset
from tpt_megatron.errors import ConfigError, DataError, RecordError
from tpt_megatron.preprocess import duplicates, finish, long_text, pieces, reading, runner
from tpt_megatron.preprocess.compose import in_validation, plain_arm
from tpt_megatron.preprocess.plan import Plan
from tpt_megatron.preprocess.runner import merge, run_preprocess
from tpt_megatron.storage import LocalLocation
from tpt_megatron.tokenizer import END_OF_DOCUMENT, load_tokenizer, train_word_tokenizer

ARMS = ("vanilla", "append", "prepend", "interleave", "mixed")


def config(folder: Path, **changes: Any) -> PreprocessConfig:
    return PreprocessConfig.model_validate({"input": str(folder / "in.jsonl"), "output": folder / "out", "tokenizer": "byte", "arms": ARMS} | changes)


def write(folder: Path, documents: list[tuple[str, list[str]]], name: str = "in.jsonl") -> None:
    with open(folder / name, "w", encoding="utf-8") as file:
        for number, (text, thoughts) in enumerate(documents):
            seen = [{"seen_end": (7 * i) % (len(text) + 1)} if i % 3 else {} for i in range(len(thoughts))]
            record = {"id": f"d{number}", "text": text, "source": f"s{number % 3}"}
            record["thoughts"] = [{"text": thought, "generator": f"g{i}", **seen[i]} for i, thought in enumerate(thoughts)]
            file.write(json.dumps(record) + "\n")


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "plan.json"}


def some(count: int) -> list[tuple[str, list[str]]]:
    return [(f"document {i}", [f"thought {i}"] * (i % 3)) for i in range(count)]


def documents_of(dataset: TokenDataset) -> list[list[int]]:
    return [dataset.tokens[a:b].tolist() for a, b in zip(dataset.offsets[:-1], dataset.offsets[1:], strict=True)]


texts = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=30).filter(lambda text: text.strip() != "")


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A byte-level BPE tokenizer in which <think> is a special token, and </think> an added one that is not."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=[END_OF_DOCUMENT, "<think>"], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([Path(__file__).read_text(encoding="utf-8")], trainer)
    backend.add_tokens(["</think>"])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    backend.save(str(path))
    return str(path)


@hypothesis_settings(max_examples=25)
@given(documents=st.lists(st.tuples(texts, st.lists(texts, max_size=3)), min_size=1, max_size=5), samples=st.booleans(), byte=st.booleans())
def test_dropping_the_thinking_tokens_gives_exactly_vanilla(
    tmp_path_factory: pytest.TempPathFactory, bpe: str, documents: list[tuple[str, list[str]]], samples: bool, byte: bool
) -> None:
    folder = tmp_path_factory.mktemp("arms")
    write(folder, documents)
    name = "byte" if byte else bpe
    manifests = run_preprocess(config(folder, tokenizer=name, thoughts="samples" if samples else "joined"))
    vanilla = open_dataset(folder / "out/vanilla/train")
    tokenizer = load_tokenizer(name, END_OF_DOCUMENT)
    plain = documents_of(vanilla)
    assert [tokenizer.decode(ids[:-1]) for ids in plain] == [text for text, _ in documents]
    for arm in ("append", "prepend", "interleave", "mixed"):
        dataset = open_dataset(folder / f"out/{arm}/train")
        assert dataset.parts is not None
        rows = pq.read_table(folder / f"out/{arm}/train.documents.parquet").to_pylist()
        for row, ids, parts in zip(rows, documents_of(dataset), np.split(dataset.parts, dataset.offsets[1:-1]), strict=True):
            assert np.array(ids)[parts == PART_DOCUMENT].tolist() == plain[int(row["id"][1:])]
            assert (row["tokens_document"], row["tokens_thinking"]) == ((parts == PART_DOCUMENT).sum(), (parts != PART_DOCUMENT).sum())
        if arm != "mixed":
            expected = [max(1, len(thoughts)) if samples else 1 for _, thoughts in documents]
            assert [row["id"] for row in rows] == [f"d{i}" for i, count in enumerate(expected) for _ in range(count)]
            assert manifests[f"{arm}/train"].counts["documents"] == len(documents)
            opening = tokenizer.encode("<think>") if byte else [1]
            thoughts = sum(len(thoughts) for _, thoughts in documents)
            everything = dataset.tokens[dataset.parts != PART_DOCUMENT].tolist()
            starts = sum(everything[i : i + len(opening)] == opening for i in range(len(everything)))
            assert starts >= thoughts if byte else starts == thoughts  # a thought may spell the delimiter
        assert (dataset.tokens[dataset.offsets[1:] - 1] == tokenizer.eod_id).all()
        assert (dataset.tokens == tokenizer.eod_id).sum() == len(dataset.lengths)


def test_interleave_puts_each_thought_after_the_tokens_that_hold_what_it_saw(tmp_path: Path, bpe: str) -> None:
    record = {
        "text": "The first part. The second part.",
        "thoughts": [{"text": "two", "generator": "g", "seen_end": 31}, {"text": "one", "generator": "g", "seen_end": 17}],
    }
    (tmp_path / "in.jsonl").write_text(json.dumps(record))
    run_preprocess(config(tmp_path, tokenizer=bpe, arms=["interleave", "vanilla"]))
    text = load_tokenizer(bpe, END_OF_DOCUMENT).decode(open_dataset(tmp_path / "out/interleave/train").tokens.tolist())
    before, thought, rest = text.partition("\n<think>\none\n</think>\n")
    assert thought
    assert before + rest.replace("\n<think>\ntwo\n</think>", "").replace("\n.", ".") == f"The first part. The second part.{END_OF_DOCUMENT}"
    assert len("The first part. T") <= len(before) < len("The first part. The second")
    assert "two" in rest


def test_mixed_takes_each_document_whole_from_one_arm(tmp_path: Path) -> None:
    write(tmp_path, [(f"document {i}", [f"thought {i}"]) for i in range(300)])
    run_preprocess(config(tmp_path, arms=["mixed", "append", "vanilla"], mixed={"append": 3, "vanilla": 1}))
    made = {arm: documents_of(open_dataset(tmp_path / f"out/{arm}/train")) for arm in ("mixed", "append", "vanilla")}
    weights = {"append": 3.0, "vanilla": 1.0}
    arms = [plain_arm("mixed", hashlib.sha256(f"document {i}".encode()).digest(), weights) for i in range(300)]
    assert 60 > arms.count("vanilla") / 5 > 10
    assert made["mixed"] == [made[arm][i] for i, arm in enumerate(arms)]


def test_append_reads_as_the_paper_has_it(tmp_path: Path) -> None:
    write(tmp_path, [("d", ["t"])])
    manifests = run_preprocess(config(tmp_path))
    dataset = open_dataset(tmp_path / "out/append/train")
    assert load_tokenizer(str(tmp_path / "out/append/train.tokenizer.json"), END_OF_DOCUMENT).decode(dataset.tokens.tolist()) == (
        f"d\n<think>\nt\n</think>{END_OF_DOCUMENT}"
    )
    assert dataset.details == manifests["append/train"].details
    assert dataset.details["arm"] == "append"
    assert dataset.details["vocabulary_size"] == 257
    counts = manifests["append/train"].counts
    assert counts["tokens"] == counts["tokens_document"] + counts["tokens_thinking"] == len(dataset.tokens)
    assert counts["tokens_document"] == 2
    assert counts["lines_read"] == counts["records"] == counts["documents"] == counts["sequences"] == 1


def test_the_split_is_the_same_in_every_arm_and_follows_the_text(tmp_path: Path) -> None:
    write(tmp_path, some(400))
    arms = ("vanilla", "append", "prepend")
    manifests = run_preprocess(config(tmp_path, validation_fraction=0.25, arms=arms))
    assert list(manifests) == [f"{arm}/{split}" for arm in arms for split in ("train", "validation")]
    rows = {name: pq.read_table(tmp_path / f"out/{name}.documents.parquet").column("id").to_pylist() for name in manifests}
    expected = [f"d{i}" for i in range(400) if in_validation(hashlib.sha256(f"document {i}".encode()).digest(), 0.25)]
    assert rows["vanilla/validation"] == expected
    assert sorted(rows["vanilla/train"] + rows["vanilla/validation"]) == sorted(f"d{i}" for i in range(400))
    assert 60 < len(rows["vanilla/validation"]) < 140
    for arm in ("append", "prepend"):
        assert rows[f"{arm}/train"] == rows["vanilla/train"]
        assert rows[f"{arm}/validation"] == rows["vanilla/validation"]
    assert sum(manifests[f"append/{split}"].counts["documents_without_thoughts"] for split in ("train", "validation")) == 134


def test_pieces_batches_and_workers_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        write(tmp_path, some(150), f"in{number}.jsonl")
    (tmp_path / "in1.jsonl").write_bytes((tmp_path / "in1.jsonl").read_bytes().replace(b'"text": "document 7"', b'"text": 7') + b"\n{\n")
    given = {"input": str(tmp_path / "in*.jsonl"), "validation_fraction": 0.1}
    whole = run_preprocess(config(tmp_path, **given))
    expected = files_of(tmp_path / "out")
    assert whole["append/train"].counts["bad_records"] == 2
    assert [json.loads(line)["where"] for line in expected["bad_records.jsonl"].splitlines()] == [f"{tmp_path / 'in1.jsonl'}:{line}" for line in (8, 152)]
    run_preprocess(config(tmp_path, **given, output=tmp_path / "cut", piece_megabytes=0.002))
    assert files_of(tmp_path / "cut") == expected
    run_preprocess(config(tmp_path, **given, output=tmp_path / "workers", piece_megabytes=0.004, workers=3))
    assert files_of(tmp_path / "workers") == expected
    monkeypatch.setattr(reading, "DOCUMENTS_PER_BATCH", 7)
    run_preprocess(config(tmp_path, **given, output=tmp_path / "batches"))
    assert files_of(tmp_path / "batches") == expected
    monkeypatch.setattr(reading, "LONG_LINE", 30)
    monkeypatch.setattr(reading, "BLOCK", 64)
    monkeypatch.setattr(long_text, "LONG_LINE", 20)
    run_preprocess(config(tmp_path, **given, output=tmp_path / "long"))
    assert files_of(tmp_path / "long") == expected
    monkeypatch.setattr(reading, "LONG_LINE", 10_000)
    monkeypatch.setattr(pieces, "WINDOW", dict.fromkeys(pieces.WINDOW, 10))
    run_preprocess(config(tmp_path, **given, output=tmp_path / "windows"))
    assert files_of(tmp_path / "windows") == expected


@pytest.mark.parametrize("deduplicate", ["none", "exact"])
def test_shards_on_one_disk_and_apart_merge_into_what_one_run_makes(tmp_path: Path, deduplicate: str) -> None:
    write(tmp_path, some(200) + some(30))
    given = {"deduplicate": deduplicate, "piece_megabytes": 0.002}
    run_preprocess(config(tmp_path, **given))
    expected = files_of(tmp_path / "out")
    for number in (2, 1, 3):
        assert run_preprocess(config(tmp_path, **given, output=tmp_path / "shared", shard=f"{number}/3")) == {}
        run_preprocess(config(tmp_path, **given, output=tmp_path / f"apart{number}", shard=f"{number}/3"))
    with pytest.raises(DataError, match="pieces are missing"):
        merge(tmp_path / "joined", [tmp_path / "apart1", tmp_path / "apart3"])
    merge(tmp_path / "shared", [])
    assert files_of(tmp_path / "shared") == expected
    merge(tmp_path / "joined", [tmp_path / f"apart{number}" for number in (1, 2, 3)])
    assert files_of(tmp_path / "joined") == expected
    run_preprocess(config(tmp_path, **given, input=[str(tmp_path / "in.jsonl")] * 2, output=tmp_path / "same", shard="1/3"))
    with pytest.raises(ConfigError, match="holds shards of other inputs or settings"):
        run_preprocess(config(tmp_path, **given, output=tmp_path / "same", shard="2/3", validation_fraction=0.5))
    write(tmp_path, some(201) + some(30))
    run_preprocess(config(tmp_path, **given, output=tmp_path / "other", shard="1/3"))
    with pytest.raises(DataError, match="shards of one run only can be joined"):
        merge(tmp_path / "wrong", [tmp_path / "same", tmp_path / "other"])
    with pytest.raises(DataError, match="no shards here"):
        merge(tmp_path / "nothing", [])


def test_of_equal_documents_the_first_stays_in_every_arm(tmp_path: Path) -> None:
    write(tmp_path, [*some(40), *some(20), ("another", []), ("document 3", ["other thought"])])
    manifests = run_preprocess(config(tmp_path, deduplicate="exact", piece_megabytes=0.001, validation_fraction=0.2))
    ids: dict[str, list[str]] = {}
    for name, manifest in manifests.items():
        rows = pq.read_table(tmp_path / f"out/{name}.documents.parquet").to_pylist()
        ids.setdefault(name.split("/")[0], []).extend(row["id"] for row in rows)
        assert manifest.counts["duplicates"] == 21
        assert manifest.counts["records"] == 62
        assert manifest.counts["documents"] == len(rows)
        tokens = open_dataset(tmp_path / "out" / name)
        assert [row["offset"] for row in rows] == tokens.offsets[:-1].tolist()
    for arm in ARMS:
        assert sorted(ids[arm]) == sorted([*(f"d{i}" for i in range(40)), "d60"])


def test_of_nearly_equal_documents_the_first_stays(tmp_path: Path) -> None:
    base = " ".join(f"word{i}" for i in range(200))
    near, far = base.replace("word150", "other"), " ".join(f"word{i}" for i in range(100, 300))
    write(tmp_path, [(base, []), (near, []), (far, []), ("short text", []), ("short text too", []), (base.upper(), [])])
    manifests = run_preprocess(config(tmp_path, arms=["vanilla"], deduplicate="near"))
    rows = pq.read_table(tmp_path / "out/vanilla/train.documents.parquet").column("id").to_pylist()
    assert rows == ["d0", "d2", "d3", "d4"]
    assert manifests["vanilla/train"].counts["duplicates"] == 2
    run_preprocess(config(tmp_path, arms=["vanilla"], deduplicate="exact", output=tmp_path / "exact"))
    assert len(open_dataset(tmp_path / "exact/vanilla/train").lengths) == 6


def test_finished_arms_are_kept_and_only_missing_or_damaged_ones_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, some(5))
    run_preprocess(config(tmp_path))
    before = files_of(tmp_path / "out")
    (tmp_path / "out/append/train.manifest.json").unlink()
    (tmp_path / "out/prepend/train.bin").write_bytes(b"damaged")
    made = []
    original = runner._work
    monkeypatch.setattr(runner, "_work", lambda *arguments: made.append(arguments[2]) or original(*arguments))
    assert len(run_preprocess(config(tmp_path))) == 5
    run_preprocess(config(tmp_path))
    assert made == [["append", "prepend"]]
    assert files_of(tmp_path / "out") == before


def test_finished_pieces_are_kept_and_damaged_or_foreign_ones_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, some(200))
    settings = config(tmp_path, arms=["vanilla", "append"], piece_megabytes=0.002)
    run_preprocess(settings)
    expected = files_of(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    original = runner.finish

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runner, "finish", fail)
    with pytest.raises(OSError, match="No space left"):
        run_preprocess(settings)
    assert not list((tmp_path / "out").glob("*/*.manifest.json"))
    (tmp_path / "out/pieces/00001/append.train.bin").write_bytes(b"short")
    (tmp_path / "out/pieces/00002/piece.json").write_text("{}")
    monkeypatch.setattr(runner, "finish", original)
    made = []
    work = runner._work
    monkeypatch.setattr(runner, "_work", lambda *arguments: made.append([piece.number for piece in arguments[5]]) or work(*arguments))
    run_preprocess(settings)
    assert made == [[1, 2]]
    assert files_of(tmp_path / "out") == expected
    assert sum("is made anew" in message for message in caplog.messages) == 2


def test_pieces_join_as_they_finish_and_an_error_leaves_nothing_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, some(200))
    settings = config(tmp_path, piece_megabytes=0.002, validation_fraction=0.2)
    run_preprocess(settings)
    expected = files_of(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(runner, "finish", lambda *arguments: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space"):
            run_preprocess(settings)
    plan, tokenizer = Plan.read(LocalLocation(tmp_path / "out/plan.json")), load_tokenizer("byte", END_OF_DOCUMENT)
    last = tmp_path / "out/pieces" / plan.pieces[-1].name
    last.rename(tmp_path / "last")

    def join_and_fail() -> None:
        with finish.Joining(settings, plan, ARMS, tokenizer) as joining:
            while joining.add_next_finished():
                pass
            assert len(list((tmp_path / "out").glob("*/.*.tmp"))) == 60  # 5 arms, 2 splits, 6 files
            raise RuntimeError

    with pytest.raises(RuntimeError):
        join_and_fail()
    assert not list((tmp_path / "out").glob("*/.*.tmp"))
    with finish.Joining(settings, plan, ARMS, tokenizer) as joining:
        joined = 0
        while joining.add_next_finished():
            joined += 1
        assert joined == len(plan.pieces) - 1 > 3
        (tmp_path / "last").rename(last)
        finish.finish(settings, plan, ARMS, tokenizer, [tmp_path / "out"], joining)
    assert files_of(tmp_path / "out") == expected


@pytest.mark.parametrize("failing", [2, 7])
def test_a_piece_that_cannot_be_synced_ends_the_run_and_leaves_nothing_unfinished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    write(tmp_path, some(200))
    settings = config(tmp_path, arms=["vanilla"], piece_megabytes=0.002)
    run_preprocess(settings)
    expected, count = files_of(tmp_path / "out"), len(Plan.read(LocalLocation(tmp_path / "out/plan.json")).pieces)
    assert count >= failing
    shutil.rmtree(tmp_path / "out")
    calls = 0
    original = files.sync_tree

    def sync(folder: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(28, "No space left on device")
        original(folder)

    with monkeypatch.context() as patch:
        patch.setattr(files, "sync_tree", sync)
        with pytest.raises(OSError, match="No space"):
            run_preprocess(settings)
    assert not list((tmp_path / "out/pieces").glob(".*.tmp"))
    assert len(list((tmp_path / "out/pieces").glob("[0-9]*"))) in (failing - 1, failing)
    run_preprocess(settings)
    assert files_of(tmp_path / "out") == expected


def test_advice_that_the_system_refuses_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(38, "Function not implemented")

    write(tmp_path, some(200))
    monkeypatch.setattr(os, "posix_fadvise", refuse)
    assert run_preprocess(config(tmp_path, piece_megabytes=0.002))["vanilla/train"].counts["documents"] == 200


def test_a_plan_of_another_release_neither_spoils_what_is_finished_nor_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, some(20))
    settings = config(tmp_path, arms=["vanilla"])
    run_preprocess(settings)
    expected = files_of(tmp_path / "out")
    (tmp_path / "out/plan.json").write_text('{"plan_version": 1}')
    run_preprocess(settings)
    assert files_of(tmp_path / "out") == expected
    shutil.rmtree(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(runner, "finish", lambda *arguments: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space"):
            run_preprocess(settings)
    (tmp_path / "out/plan.json").write_text('{"plan_version": 1}')
    run_preprocess(settings)
    assert "what was finished of the last run is made anew" in caplog.text
    assert files_of(tmp_path / "out") == expected


def test_pieces_wait_where_duplicates_are_to_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, some(200))
    settings = config(tmp_path, piece_megabytes=0.002, deduplicate="exact")
    joined: list[bool] = []

    def look(config: PreprocessConfig, plan: Plan, arms: Any, tokenizer: Any, folders: Any, joining: finish.Joining) -> Any:
        joined.append(joining.add_next_finished())
        return finish.finish(config, plan, arms, tokenizer, folders, joining)

    monkeypatch.setattr(runner, "finish", look)
    assert run_preprocess(settings)["vanilla/train"].counts["duplicates"] == 0
    assert joined == [False]


def test_an_input_that_changes_in_an_unfinished_run_is_read_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, some(200))
    with monkeypatch.context() as patch:
        patch.setattr(runner, "finish", lambda *arguments: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space"):
            run_preprocess(config(tmp_path, arms=["vanilla"]))
    write(tmp_path, [("Document 0", []), *some(200)[1:]])
    run_preprocess(config(tmp_path, arms=["vanilla"]))
    assert "what was finished of the last run is made anew" in caplog.text
    assert documents_of(open_dataset(tmp_path / "out/vanilla/train"))[0][0] == load_tokenizer("byte", END_OF_DOCUMENT).encode("D")[0]


def test_an_input_that_changes_while_it_is_read_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, some(20))
    work = runner._work

    def change(*arguments: Any) -> None:
        work(*arguments)
        write(tmp_path, some(21))

    with monkeypatch.context() as patch:
        patch.setattr(runner, "_work", change)
        with pytest.raises(DataError, match=r"in\.jsonl: has changed while it was read"):
            run_preprocess(config(tmp_path))
    assert run_preprocess(config(tmp_path))["append/train"].counts["documents"] == 21


def test_what_a_kill_after_the_last_manifest_leaves_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, some(20))
    with monkeypatch.context() as patch:
        patch.setattr(finish, "forget_pieces", lambda output: None)
        run_preprocess(config(tmp_path))
    assert (tmp_path / "out/pieces/00000").is_dir()
    run_preprocess(config(tmp_path, arms=ARMS[:1]))
    assert (tmp_path / "out/pieces/00000").is_dir()
    run_preprocess(config(tmp_path))
    assert not (tmp_path / "out/pieces").exists()


def test_a_shard_leaves_the_unfinished_pieces_of_others_alone(tmp_path: Path) -> None:
    write(tmp_path, some(200))
    run_preprocess(config(tmp_path, piece_megabytes=0.004, shard="1/2"))
    others, own = tmp_path / "out/pieces/.00003.999999.tmp", tmp_path / "out/pieces/.00000.999999.tmp"
    others.mkdir()
    own.mkdir()
    (own.parent / "00000/piece.json").unlink()
    run_preprocess(config(tmp_path, piece_megabytes=0.004, shard="1/2"))
    assert others.is_dir() and not own.exists()


def test_two_runs_on_one_output_are_refused_and_shards_are_not(tmp_path: Path) -> None:
    write(tmp_path, some(200))
    with runner._alone(tmp_path / "out", 0), runner._alone(tmp_path / "out", 1):
        for again in (None, 1):
            with pytest.raises(ConfigError, match="another tpt preprocess is at work there"), runner._alone(tmp_path / "out", again):
                pass
    with runner._alone(tmp_path / "out", None):
        for again in (None, 1):
            with pytest.raises(ConfigError, match="another tpt preprocess is at work there"), runner._alone(tmp_path / "out", again):
                pass
    with runner._alone(tmp_path / "out", None):
        pass


def test_outputs_of_other_settings_or_inputs_are_refused(tmp_path: Path) -> None:
    write(tmp_path, some(5))
    run_preprocess(config(tmp_path))
    for changes in ({"delimiters": {"open": "<t>"}}, {"validation_fraction": 0.5}):
        with pytest.raises(ConfigError, match="other settings; give another output"):
            run_preprocess(config(tmp_path, **changes))
    (tmp_path / "in.jsonl").touch()
    run_preprocess(config(tmp_path))
    write(tmp_path, some(6))
    with pytest.raises(ConfigError, match="other inputs; give another output"):
        run_preprocess(config(tmp_path))


def test_delimiters_outside_a_closed_vocabulary_are_refused_before_any_work(tmp_path: Path) -> None:
    write(tmp_path, some(2))
    path = tmp_path / "tokenizer.json"
    train_word_tokenizer(["document thought"], ["<think>"]).save(path)
    with pytest.raises(ConfigError, match=r"delimiters\.close='</think>' is unknown to the tokenizer"):
        run_preprocess(config(tmp_path, tokenizer=str(path)))
    assert not (tmp_path / "out").exists()
    run_preprocess(config(tmp_path, tokenizer=str(path), arms=["vanilla"]))


@pytest.mark.parametrize(
    ("delimiters", "message"),
    [
        ({"open": "<|thought|>"}, r"delimiters\.open='<\|thought\|>' is spelled as a special token, but the tokenizer .* has no such token"),
        ({"close": END_OF_DOCUMENT}, "one of them is the end-of-document token"),
    ],
)
def test_delimiters_that_would_not_be_what_they_seem_are_refused(tmp_path: Path, bpe: str, delimiters: dict[str, str], message: str) -> None:
    write(tmp_path, some(2))
    with pytest.raises(ConfigError, match=message):
        run_preprocess(config(tmp_path, tokenizer=bpe, delimiters=delimiters))


def test_delimiters_are_the_same_tokens_whatever_stands_beside_them(tmp_path: Path, bpe: str, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, [(text, [text]) for text in ("a", "<", ">", "><", "think", " x ", "\\n<th", "!")])
    delimiters = {"open": "<<", "close": ">>", "between": "\n", "inside": ""}
    with caplog.at_level(logging.INFO, "tpt_megatron"):
        run_preprocess(config(tmp_path, tokenizer=bpe, arms=["append"], delimiters=delimiters))
        run_preprocess(config(tmp_path, tokenizer=bpe, arms=["append"], output=tmp_path / "marked"))
    assert "delimiters.open='<<': text of 2 token(s)" in caplog.text
    assert "delimiters.open='<think>': one token of its own [1]" in caplog.text
    tokenizer = load_tokenizer(bpe, END_OF_DOCUMENT)
    opening, closing = tokenizer.encode("<<"), tokenizer.encode(">>")
    dataset = open_dataset(tmp_path / "out/append/train")
    assert dataset.parts is not None
    for ids, parts in zip(documents_of(dataset), np.split(dataset.parts, dataset.offsets[1:-1]), strict=True):
        thinking = np.array(ids)[parts != PART_DOCUMENT].tolist()
        assert thinking[1 : 1 + len(opening)] == opening
        assert thinking[-len(closing) :] == closing


def test_no_documents_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path, [])
    with pytest.raises(DataError, match=r"no document for train \(0 lines read"):
        run_preprocess(config(tmp_path))
    write(tmp_path, [("a", [])])
    with pytest.raises(DataError, match=r"(raise|lower) validation_fraction=0\.5"):
        run_preprocess(config(tmp_path, validation_fraction=0.5))
    assert not [name for name in files_of(tmp_path / "out") if not name.startswith("pieces/")]


@pytest.mark.parametrize("long", [False, True])
def test_a_text_that_this_tokenizer_would_read_as_an_end_is_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, long: bool) -> None:
    if long:
        monkeypatch.setattr(reading, "LONG_LINE", 30)
        monkeypatch.setattr(reading, "BLOCK", 64)
        monkeypatch.setattr(long_text, "LONG_LINE", 20)
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "a": 1, "</s>": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, [("a a a a a a a a a a", []), ("a a a a a </s> a a a a", []), ("a </sa> a a a a a a a a", [])])
    given = {"tokenizer": str(tmp_path / "tokenizer.json"), "end_of_document": "</s>", "arms": ["vanilla"]}
    counts = run_preprocess(config(tmp_path, **given))["vanilla/train"].counts
    assert (counts["documents"], counts["bad_records"]) == (2, 1)
    (entry,) = [json.loads(line) for line in (tmp_path / "out/bad_records.jsonl").read_text().splitlines()]
    assert entry["where"].endswith("in.jsonl:2")
    assert entry["reason"] == "the text spells '</s>', which this tokenizer reads as the end of the document"
    assert (open_dataset(tmp_path / "out/vanilla/train").tokens == 2).sum() == 2


def test_shards_of_other_arms_or_of_an_input_that_changed_are_not_joined(tmp_path: Path) -> None:
    write(tmp_path, some(200))
    given = {"piece_megabytes": 0.004, "arms": ["vanilla", "append"]}
    run_preprocess(config(tmp_path, **given, shard="1/2"))
    with pytest.raises(ConfigError, match="holds shards of other arms"):
        run_preprocess(config(tmp_path, **(given | {"arms": ["vanilla"]}), shard="2/2"))
    run_preprocess(config(tmp_path, **(given | {"arms": ["vanilla"]}), shard="2/2", output=tmp_path / "other"))
    with pytest.raises(DataError, match=r"lacks the arms \['append'\]"):
        merge(tmp_path / "out", [tmp_path / "other"])
    (tmp_path / "in.jsonl").write_bytes((tmp_path / "in.jsonl").read_bytes().replace(b"document", b"Document"))
    run_preprocess(config(tmp_path, **given, shard="2/2"))
    with pytest.raises(DataError, match=r"in\.jsonl: has changed between the shards"):
        merge(tmp_path / "out", [])
    run_preprocess(config(tmp_path, **given, shard="1/2"))
    merge(tmp_path / "out", [])
    tokenizer = load_tokenizer("byte", END_OF_DOCUMENT)
    assert "document" not in tokenizer.decode(open_dataset(tmp_path / "out/vanilla/train").tokens.tolist())
    with pytest.raises(DataError, match="they were joined before"):
        merge(tmp_path / "out", [])
    with pytest.raises(DataError, match="has no pieces"):
        merge(tmp_path / "out", [tmp_path / "nowhere"])


def test_too_many_shards_are_refused_and_smaller_pieces_are_the_way_out(tmp_path: Path) -> None:
    write(tmp_path, some(200))
    with pytest.raises(ConfigError, match="give fewer shards or a smaller piece_megabytes"):
        run_preprocess(config(tmp_path, shard="1/3"))
    run_preprocess(config(tmp_path, shard="1/3", piece_megabytes=0.004))


def test_under_fail_nothing_that_set_a_record_aside_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, some(20))
    with open(tmp_path / "in.jsonl", "a") as file:
        file.write("{\n")
    with monkeypatch.context() as patch:
        patch.setattr(runner, "finish", lambda *arguments: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space"):
            run_preprocess(config(tmp_path))
    with pytest.raises(RecordError, match=r"in\.jsonl:21: "):
        run_preprocess(config(tmp_path, on_bad_record="fail"))
    run_preprocess(config(tmp_path))
    with pytest.raises(DataError, match="made with 1 bad records set aside"):
        run_preprocess(config(tmp_path, on_bad_record="fail"))


def test_the_documents_of_an_arm_do_not_depend_on_the_other_arms(tmp_path: Path) -> None:
    write(tmp_path, some(20))
    with open(tmp_path / "in.jsonl", "a") as file:
        file.write(json.dumps({"text": "abc", "thoughts": [{"text": "t", "generator": "g", "seen_end": 4}]}) + "\n")
    alone = run_preprocess(config(tmp_path, arms=["vanilla"]))["vanilla/train"].counts
    assert (alone["documents"], alone["bad_records"]) == (20, 1)
    assert run_preprocess(config(tmp_path, arms=["vanilla", "interleave"]))["interleave/train"].counts["documents"] == 20


def test_a_glob_that_takes_the_output_in_and_a_remote_output_are_refused(tmp_path: Path) -> None:
    write(tmp_path, some(5))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/bad_records.jsonl").write_text('{"text": "a"}')
    with pytest.raises(ConfigError, match=r"takes in .*bad_records\.jsonl, which lies in output="):
        run_preprocess(config(tmp_path, input=str(tmp_path / "**/*.jsonl")))
    with pytest.raises(ValidationError, match="must be a folder of this machine"):
        config(tmp_path, output="s3://bucket/data")
    with pytest.raises(ConfigError, match=r"threshold=0\.999 with permutations=16 is impossible"):
        run_preprocess(config(tmp_path, output=tmp_path / "near", deduplicate="near", near_duplicates={"threshold": 0.999, "permutations": 16}))


def test_repeats_are_found_in_any_bucket_and_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(0)
    keys = [[draw.randrange(40).to_bytes(16, "little") for _ in range(2)] for _ in range(300)]
    counts = [0, 120, 1, 179]
    begin = 0
    for number, count in enumerate(counts):
        (tmp_path / f"{number}.bin").write_bytes(b"".join(key for both in keys[begin : begin + count] for key in both))
        begin += count
    expected, seen = [], set()
    for both in keys:
        expected.append(not seen & set(both))
        seen |= set(both)
    for size, block in ((48_000_000, 1 << 19), (500, 16)):
        monkeypatch.setattr(duplicates, "BUCKET_BYTES", size)
        monkeypatch.setattr(duplicates, "ENTRIES_AT_ONCE", block)
        found = duplicates.first_ones([tmp_path / f"{number}.bin" for number in range(4)], counts, 2, tmp_path)
        assert found.tolist() == expected
    assert 5 < sum(expected) < 40
