"""Augmentation from and to object storage: a real S3 protocol server on this machine, and the command as a user runs it."""

from __future__ import annotations

import gzip
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs

from tests.support.augment_runs import DOCUMENT_PATTERN, output_of, run, start, write_config
from tests.support.s3 import s3_server
from tests.support.scripted_server import running_server
from tpt_megatron.config.preprocess import PreprocessConfig
from tpt_megatron.preprocess.runner import run_preprocess
from tpt_megatron.storage import locate


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3fs.S3FileSystem]:
    with s3_server(tmp_path_factory.mktemp("s3") / "server.log") as found:
        yield found


def test_one_of_many_that_create_an_object_wins(s3: s3fs.S3FileSystem) -> None:
    s3.mkdir("once")
    place = locate("s3://once/folder/claim.json")
    assert [place.create(content) for content in (b"first", b"second")] == [True, False]
    assert place.read_bytes() == b"first"
    place.write(b"third")
    assert place.read_bytes() == b"third"
    assert locate("s3://once/folder").names() == ["claim.json"]
    place.remove()
    assert not place.is_file()
    assert place.create(b"fourth")


def test_a_corpus_in_s3_is_augmented_killed_and_continued_there(s3: s3fs.S3FileSystem, tmp_path: Path) -> None:
    s3.mkdir("corpus")
    texts = [f"Document number {i} is about the number {i * i}, its square." for i in range(300)]
    records = [{"id": str(i), "text": text, "source": "made-up"} for i, text in enumerate(texts)]
    s3.pipe("corpus/in/a.jsonl.gz", gzip.compress(b"".join(json.dumps(record).encode() + b"\n" for record in records[:100])))
    s3.pipe("corpus/in/b.jsonl", b"".join(json.dumps(record).encode() + b"\n" for record in records[100:200]) + b"{broken\n")
    pq.write_table(pa.Table.from_pylist(records[200:]), tmp_path / "c.parquet")
    s3.put(str(tmp_path / "c.parquet"), "corpus/in/c.parquet")
    with running_server(reply_ms=50, document_pattern=DOCUMENT_PATTERN) as server:
        config = write_config(tmp_path / "c.yaml", "s3://corpus/in", "s3://corpus/out", server.url, shard={"documents": 25}, flush_s=0.3)
        with start(config, "generator.concurrency.initial=4", "generator.concurrency.maximum=4") as process:
            deadline = time.monotonic() + 120
            while sum(name.endswith(".manifest.json") for name in locate("s3://corpus/out/shards").names()) < 2:
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.1)
            process.send_signal(signal.SIGKILL)
        kept = {name: s3.cat(f"corpus/out/shards/{name}") for name in locate("s3://corpus/out/shards").names() if name.endswith(".manifest.json")}
        said = run(config)
        log = server.log()
    assert "301 lines read" in said
    assert "s3://corpus/in/b.jsonl:101: not valid JSON" in said
    assert all(s3.cat(f"corpus/out/shards/{name}") == content for name, content in kept.items())
    assert [(augmented.document.id, augmented.document.text, augmented.document.source) for augmented in output_of("s3://corpus/out")] == [
        (str(i), text, "made-up") for i, text in enumerate(texts)
    ]
    assert set(log["documents"]) == {str(i) for i in range(300)}
    assert sum(log["documents"].values()) < 330
    assert locate("s3://corpus/out").names() == ["bad", "manifest.json", "plan.json", "report.html", "shards"]

    prepared = run_preprocess(PreprocessConfig(input=("s3://corpus/out",), output=tmp_path / "data", tokenizer="byte"))
    assert prepared["append/train"].counts["documents"] == 300
    assert prepared["append/train"].counts["tokens_thinking"] > 0


def test_a_store_that_cannot_be_reached_is_one_line(s3: s3fs.S3FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    config = write_config(tmp_path / "c.yaml", "s3://corpus/in", str(tmp_path / "out"), "http://127.0.0.1:9/v1")
    said = run(config, exit_code=1)
    assert said.splitlines()[-1].startswith("tpt: ")
    assert "Traceback" not in said
