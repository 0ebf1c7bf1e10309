"""Augmentation killed, stopped, and cut off from its server: nothing that was finished is lost or done twice."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from tests.support.augment_runs import DOCUMENT_PATTERN, output_of, run, start, write_config, write_documents
from tests.support.scripted_server import running_server
from tpt_megatron.errors import DataError
from tpt_megatron.record_files import expand_inputs


def finished_shards(folder: Path) -> dict[str, bytes]:
    """The files of shards that are finished, by name: those that their manifests name, and the manifests."""
    files = {}
    for manifest in folder.glob("shards/*.manifest.json"):
        files[f"shards/{manifest.name}"] = manifest.read_bytes()
        for entry in json.loads(manifest.read_bytes())["outputs"]:
            files[entry["name"]] = (folder / entry["name"]).read_bytes()
    return files


def wait_for(process: object, condition: object, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert process.poll() is None, process.communicate()  # type: ignore[attr-defined]
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.01)


@pytest.mark.slow
def test_killed_at_twenty_moments_every_document_comes_out_exactly_once(tmp_path: Path) -> None:
    documents, draw, output = 6000, random.Random(0), tmp_path / "out"
    write_documents(tmp_path / "in.jsonl", documents)
    with running_server(reply_ms=20, document_pattern=DOCUMENT_PATTERN) as server:
        config = write_config(tmp_path / "c.yaml", str(tmp_path / "in.jsonl"), str(output), server.url, shard={"documents": 50}, flush_s=0.2)
        slow = ("generator.concurrency.initial=6", "generator.concurrency.maximum=6")
        finished: dict[str, bytes] = {}
        for kill in range(20):
            claims = {path.name for path in output.glob("claims/*")}
            with start(config, *slow) as process:
                if kill % 4:  # in the middle of its work; every fourth anywhere from its very start
                    wait_for(process, lambda claims=claims: {path.name for path in output.glob("claims/*")} - claims)
                time.sleep(draw.uniform(0, 1.2))
                assert process.poll() is None, "it was done before it could be killed; make the corpus larger"
                process.send_signal(signal.SIGKILL)
            assert process.returncode == -signal.SIGKILL
            now = finished_shards(output)
            assert {name: now.get(name) for name in finished} == finished, f"a finished shard has changed after kill {kill}"
            finished = now
            assert not (output / "manifest.json").exists()
            with pytest.raises(DataError):
                expand_inputs((str(output),)) or pytest.fail("an unfinished output was read")
        assert len(finished) > 40, "too little was finished between the kills to say anything"
        said = run(config, "generator.concurrency.initial=16")
        assert "shards finished before, kept" in said
        log = server.log()
    now = finished_shards(output)
    assert {name: now.get(name) for name in finished} == finished
    assert [augmented.document.id for augmented in output_of(output)] == [str(i) for i in range(documents)]
    assert all(len(augmented.thoughts) == 1 for augmented in output_of(output))
    # Asked again is only what was under way at a kill, or finished in the last 0.2 s before it and so not yet saved.
    again = sum(count - 1 for count in log["documents"].values())
    assert len(log["documents"]) == documents
    assert again < 20 * (6 + 6 / 0.020 * 0.2 * 3), again
    assert sorted(path.name for path in output.iterdir()) == ["manifest.json", "plan.json", "report.html", "shards"]


def test_what_is_saved_of_an_unfinished_shard_is_not_asked_for_again(tmp_path: Path) -> None:
    write_documents(tmp_path / "in.jsonl", 200)
    with running_server(reply_ms=20, document_pattern=DOCUMENT_PATTERN) as server:
        config = write_config(tmp_path / "c.yaml", str(tmp_path / "in.jsonl"), str(tmp_path / "out"), server.url, flush_s=0.1)
        with start(config, "generator.concurrency.initial=4", "generator.concurrency.maximum=4") as process:
            wait_for(process, lambda: len(list(tmp_path.glob("out/journal/*/*"))) >= 3)
            process.kill()
        before = sum(server.log()["documents"].values())
        said = run(config)
        after = server.log()["documents"]
    assert "had been saved by earlier workers, kept" in said
    assert sum(after.values()) - before < 200 - 20
    assert [augmented.document.id for augmented in output_of(tmp_path / "out")] == [str(i) for i in range(200)]


@pytest.mark.parametrize(("workers", "signal_sent"), [(1, signal.SIGTERM), (2, signal.SIGTERM), (2, signal.SIGINT)])
def test_a_signal_finishes_what_is_under_way_and_exits_3(tmp_path: Path, workers: int, signal_sent: signal.Signals) -> None:
    write_documents(tmp_path / "in.jsonl", 2000)
    with running_server(reply_ms=300, document_pattern=DOCUMENT_PATTERN) as server:
        changes = {"shard": {"documents": 100}, "workers": workers, "grace_s": 600}
        config = write_config(tmp_path / "c.yaml", str(tmp_path / "in.jsonl"), str(tmp_path / "out"), server.url, **changes)
        with start(config, own_group=True) as process:
            wait_for(process, lambda: server.log()["replies"] > 40)
            os.killpg(process.pid, signal_sent)  # as a terminal or Slurm does: parent and workers, and the parent tells its workers too
            _, err = process.communicate(timeout=60)  # far less than the grace period: nothing waits for what has ended
        assert process.returncode == 3, err
        assert "run the same command again to continue" in err
        log = server.log()
        assert log["replies"] == log["requests"], "a request under way was not waited for"
        run(config, "generator.concurrency.initial=256", "generator.concurrency.maximum=256")
        again = server.log()
    assert max(again["documents"].values()) == 1, "a document that was finished was asked for again"
    assert [augmented.document.id for augmented in output_of(tmp_path / "out")] == [str(i) for i in range(2000)]


def test_after_the_grace_period_what_hangs_is_left(tmp_path: Path) -> None:
    write_documents(tmp_path / "in.jsonl", 20)
    with running_server(reply_ms=5, script=[{"fault": "hang", "match": "Document number 7 "}]) as server:
        config = write_config(tmp_path / "c.yaml", str(tmp_path / "in.jsonl"), str(tmp_path / "out"), server.url, grace_s=1)
        with start(config) as process:
            wait_for(process, lambda: server.log()["replies"] == 19)
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)
        assert process.returncode == 3
        assert time.monotonic() - began < 15
        server.script()
        assert "19 documents of unfinished shards had been saved" in " ".join(run(config).split())
    assert sum(1 for _ in output_of(tmp_path / "out")) == 20


def test_a_signal_that_comes_as_the_last_documents_end_completes_the_output(tmp_path: Path) -> None:
    write_documents(tmp_path / "in.jsonl", 10)
    with running_server(reply_ms=3000) as server:
        config = write_config(tmp_path / "c.yaml", str(tmp_path / "in.jsonl"), str(tmp_path / "out"), server.url)
        with start(config) as process:
            wait_for(process, lambda: server.log()["under_way"] == 10)
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert sum(1 for _ in output_of(tmp_path / "out")) == 10


@pytest.mark.slow
def test_a_server_that_is_gone_for_thirty_seconds_costs_no_document(tmp_path: Path) -> None:
    write_documents(tmp_path / "in.jsonl", 4000)
    with running_server(reply_ms=20) as server:
        config = write_config(tmp_path / "c.yaml", str(tmp_path / "in.jsonl"), str(tmp_path / "out"), server.url)
        with start(config) as process:
            wait_for(process, lambda: server.log()["replies"] > 500)
            server.kill()
            time.sleep(30)
            assert process.poll() is None, process.communicate()
            server.start()
            _, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
        assert "1 of 1 servers do not answer, and are tried again" in err
        assert "all servers answer again" in err
    outputs = list(output_of(tmp_path / "out"))
    assert [augmented.document.id for augmented in outputs] == [str(i) for i in range(4000)]
    assert all(len(augmented.thoughts) == 1 for augmented in outputs)


def test_a_server_that_is_gone_for_good_ends_the_run_and_finished_work_stays(tmp_path: Path) -> None:
    write_documents(tmp_path / "in.jsonl", 2000)
    with running_server(reply_ms=20) as server:
        generator = {"outage_limit_s": 3}
        config = write_config(tmp_path / "c.yaml", str(tmp_path / "in.jsonl"), str(tmp_path / "out"), server.url, generator=generator, shard={"documents": 50})
        with start(config) as process:
            wait_for(process, lambda: len(list(tmp_path.glob("out/shards/*.manifest.json"))) > 3)
            server.kill()
            began = time.monotonic()
            _, err = process.communicate(timeout=100)
        assert process.returncode == 1
        assert time.monotonic() - began < 40
        (line,) = (line for line in err.splitlines() if line.startswith("tpt: "))
        assert re.search(r"no server answered for \d+ s", line)
        assert server.url in line
        assert "Traceback" not in err
        kept = finished_shards(tmp_path / "out")
        assert len(kept) > 6
        server.start()
        run(config)
    now = finished_shards(tmp_path / "out")
    assert {name: now.get(name) for name in kept} == kept
    assert [augmented.document.id for augmented in output_of(tmp_path / "out")] == [str(i) for i in range(2000)]


def test_a_worker_process_that_is_killed_ends_the_run_and_nothing_hangs(tmp_path: Path) -> None:
    write_documents(tmp_path / "in.jsonl", 3000)
    with running_server(reply_ms=50) as server:
        config = write_config(tmp_path / "c.yaml", str(tmp_path / "in.jsonl"), str(tmp_path / "out"), server.url, workers=2, shard={"documents": 50})
        with start(config) as process:
            wait_for(process, lambda: len(list(tmp_path.glob("out/shards/*.manifest.json"))) > 1)
            workers = [child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())]
            assert len(workers) == 2
            workers[0].kill()
            _, err = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "worker 0 was killed by signal 9; what was finished is kept" in " ".join(err.split()) or "worker 1 was killed by signal 9" in " ".join(
            err.split()
        )
        run(config)
    assert [augmented.document.id for augmented in output_of(tmp_path / "out")] == [str(i) for i in range(3000)]


def test_a_worker_process_that_is_stopped_from_outside_stops_the_run_with_exit_code_3(tmp_path: Path) -> None:
    write_documents(tmp_path / "in.jsonl", 3000)
    with running_server(reply_ms=50) as server:
        config = write_config(tmp_path / "c.yaml", str(tmp_path / "in.jsonl"), str(tmp_path / "out"), server.url, workers=2, shard={"documents": 50})
        with start(config) as process:
            wait_for(process, lambda: len(list(tmp_path.glob("out/shards/*.manifest.json"))) > 1)
            next(child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())).terminate()
            _, err = process.communicate(timeout=60)
    assert process.returncode == 3, err
    assert re.search(r"tpt: worker [01] was stopped by a signal; what was finished is kept", err)


def test_workers_that_start_at_once_share_the_shards_and_none_is_done_twice(tmp_path: Path) -> None:
    write_documents(tmp_path / "in.jsonl", 1500)
    with running_server(reply_ms=20, document_pattern=DOCUMENT_PATTERN) as server:
        config = write_config(tmp_path / "c.yaml", str(tmp_path / "in.jsonl"), str(tmp_path / "out"), server.url, shard={"documents": 30})
        processes = [start(config) for _ in range(3)]
        said = [process.communicate(timeout=120) for process in processes]
        assert [process.returncode for process in processes] == [0, 0, 0], said
        log = server.log()
    assert set(log["documents"].values()) == {1}
    assert [augmented.document.id for augmented in output_of(tmp_path / "out")] == [str(i) for i in range(1500)]


def test_bad_replies_of_every_kind_cost_no_document_while_others_succeed(tmp_path: Path) -> None:
    write_documents(tmp_path / "in.jsonl", 300)
    faults = ("reset", "truncate", "malformed", "html", "no_choices", "drip")
    rules = [{"fault": fault, "share": 0.05, "times": 2} for fault in faults]
    rules += [{"fault": "status", "status": status, "share": 0.05, "times": 2, "retry_after": "0.2"} for status in (429, 500, 503)]
    with running_server(reply_ms=5, script=rules) as server:
        config = write_config(tmp_path / "c.yaml", str(tmp_path / "in.jsonl"), str(tmp_path / "out"), server.url, generator={"attempts": 20})
        run(config)
        log = server.log()
    assert set(log["faults"]) == {*faults, "status 429", "status 500", "status 503"}
    assert all(len(augmented.thoughts) == 1 for augmented in output_of(tmp_path / "out"))


def test_a_request_that_never_succeeds_is_counted_and_the_rest_goes_on(tmp_path: Path) -> None:
    write_documents(tmp_path / "in.jsonl", 100)
    with running_server(reply_ms=5, script=[{"fault": "malformed", "match": "Document number 5 "}]) as server:
        config = write_config(tmp_path / "c.yaml", str(tmp_path / "in.jsonl"), str(tmp_path / "out"), server.url, generator={"attempts": 3})
        said = " ".join(run(config).split())
    assert "1 thoughts were rejected: 1 request_failed" in said
    assert [len(augmented.thoughts) for augmented in output_of(tmp_path / "out")] == [1] * 5 + [0] + [1] * 94


def test_a_run_with_nothing_left_but_a_document_that_always_fails_ends_all_the_same(tmp_path: Path) -> None:
    write_documents(tmp_path / "in.jsonl", 1)
    with running_server(reply_ms=5, script=[{"fault": "malformed", "match": "Document number 0 "}]) as server:
        config = write_config(tmp_path / "c.yaml", str(tmp_path / "in.jsonl"), str(tmp_path / "out"), server.url, generator={"attempts": 2})
        said = run(config)
    assert "1 thoughts were rejected: 1 request_failed" in said
    assert [len(augmented.thoughts) for augmented in output_of(tmp_path / "out")] == [0]


def test_a_wrong_key_ends_the_run_at_once_and_is_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    write_documents(tmp_path / "in.jsonl", 100)
    with running_server(api_key="another") as server:
        config = write_config(tmp_path / "c.yaml", str(tmp_path / "in.jsonl"), str(tmp_path / "out"), server.url)
        said = run(config, exit_code=1)
    assert "401" in said
    kept = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert "sk-very-secret" not in said
    assert b"sk-very-secret" not in kept


def test_a_full_claim_of_a_worker_on_another_machine_is_taken_over_when_it_stays_silent(tmp_path: Path) -> None:
    """A claim as another machine would have left it: alive while its beat moves, dead when it stands still."""
    write_documents(tmp_path / "in.jsonl", 60)
    with running_server(reply_ms=5) as server:
        config = write_config(tmp_path / "c.yaml", str(tmp_path / "in.jsonl"), str(tmp_path / "out"), server.url, shard={"documents": 20}, claim_timeout_s=3)
        claim = tmp_path / "out/claims/00001.000.json"
        claim.parent.mkdir(parents=True)
        content = {"worker": "far", "host": "elsewhere", "machine": "another", "process": 1, "started": 0.0, "beat": 0, "released": False}
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(0.3):
                content["beat"] += 1
                claim.with_suffix(".new").write_text(json.dumps(content))
                claim.with_suffix(".new").replace(claim)

        beating = threading.Thread(target=beat)
        (tmp_path / "out/plan.json").write_bytes(planned(config, tmp_path))
        claim.write_text(json.dumps(content))
        beating.start()
        try:
            said = " ".join(run(config).split())
        finally:
            stop.set()
            beating.join()
        assert "1 of 3 shards are still at work elsewhere (1 with elsewhere:1)" in said
        assert not (tmp_path / "out/manifest.json").exists()
        run(config)
    assert [augmented.document.id for augmented in output_of(tmp_path / "out")] == [str(i) for i in range(60)]


def planned(config: Path, folder: Path) -> bytes:
    """The plan that a run makes, as made by an estimate of another output."""
    run(config, f"output={folder / 'planned'}", "--estimate")
    return (folder / "planned/plan.json").read_bytes()
