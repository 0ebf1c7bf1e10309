"""Training with its checkpoints mirrored to object storage: a lost disk, kills within uploads, a store that is gone. A real S3 server, real processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import s3fs

from tests.support.metrics import learned
from tests.support.s3 import Road, s3_server
from tests.support.tensors import assert_same_tensors
from tests.support.train_runs import preprocess_corpus, write_train_config
from tpt_megatron.mirror import Mirror
from tpt_megatron.storage import locate

STEPS = 12
TRACKER = "latest_checkpointed_iteration.txt"


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3fs.S3FileSystem]:
    with s3_server(tmp_path_factory.mktemp("s3") / "server.log") as found:
        found.mkdir("runs")
        yield found


@pytest.fixture
def road(s3: s3fs.S3FileSystem, monkeypatch: pytest.MonkeyPatch) -> Iterator[Road]:
    """What the runs that a test starts reach the store by; the test itself goes straight there."""
    road = Road(int(os.environ["AWS_ENDPOINT_URL"].rsplit(":", 1)[1]), bytes_per_s=1e9)
    monkeypatch.setenv("AWS_ENDPOINT_URL", road.url)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    yield road
    road.close()


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for name, seed in (("datasets", 1), ("other", 2)):
        preprocess_corpus(root, name, seed)
    return root


def write_config(folder: Path, datasets: Path, **checkpoint: Any) -> Path:
    return write_train_config(folder, datasets, steps=STEPS, checkpoint={"every_steps": 4, **checkpoint})


def start(config: Path, *overrides: str, ranks: int = 1) -> subprocess.Popen[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *torchrun, "-m", "tpt_megatron.cli", "train", str(config), *overrides]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def train(config: Path, *overrides: str, code: int = 0, ranks: int = 1) -> str:
    process = start(config, *overrides, ranks=ranks)
    _, said = process.communicate(timeout=200)
    assert process.returncode == code, said[-4000:]
    assert ranks > 1 or "Traceback" not in said
    return said


def wait_until(process: subprocess.Popen[str], ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not ready():
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def names_of(s3: s3fs.S3FileSystem, mirror: str) -> set[str]:
    return {path.removeprefix(mirror.removeprefix("s3://") + "/") for path in s3.find(mirror)}


def complete(s3: s3fs.S3FileSystem, mirror: str) -> list[int]:
    return sorted(int(name.split("/")[0].removeprefix("iter_")) for name in names_of(s3, mirror) if name.endswith("/checksums.json"))


def assert_mirrors(s3: s3fs.S3FileSystem, mirror: str, run: Path) -> None:
    """Byte for byte what is in the run's folder is there, and nothing else."""
    here = {str(path.relative_to(run / "checkpoints")): path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()}
    del here["mirrored.json"]
    assert {name: s3.cat(f"{mirror}/{name}") for name in names_of(s3, mirror)} == here


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, datasets: Path) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    train(write_config(folder, datasets))
    return folder / "run"


def test_a_run_whose_disk_is_lost_goes_on_from_the_mirror_bit_for_bit(
    tmp_path: Path, s3: s3fs.S3FileSystem, road: Road, datasets: Path, unbroken: Path
) -> None:
    mirror, run = "s3://runs/lost", tmp_path / "run"
    config = write_config(tmp_path, datasets, mirror=mirror)
    said = train(config, "steps=8")
    assert "iter_0000008: copied to s3://runs/lost/iter_0000008, 0." in said
    assert_mirrors(s3, mirror, run)
    shutil.rmtree(run)
    said = train(config)
    assert f"{run}/checkpoints/iter_0000008: fetched from s3://runs/lost/iter_0000008, 0." in said
    assert f"{run}: continuing after step 8" in said
    assert learned(run) == learned(unbroken)[8:]
    assert_same_tensors(run, unbroken)
    assert complete(s3, mirror) == [4, 8, 12]
    assert s3.cat(f"{mirror}/{TRACKER}") == b"12\n"
    assert not list((run / "checkpoints").glob(".*"))


@pytest.mark.slow
def test_a_mirror_that_does_not_agree_with_the_run_loses_nothing(tmp_path: Path, s3: s3fs.S3FileSystem, road: Road, datasets: Path, unbroken: Path) -> None:
    mirror, run = "s3://runs/differs", tmp_path / "run"
    shutil.copytree(unbroken, run)
    config = write_config(tmp_path, datasets, mirror=mirror)
    train(config)
    assert_mirrors(s3, mirror, run)

    # The arm of another dataset, whose config was copied with its mirror: nothing is fetched, nothing is overwritten.
    other = write_config(tmp_path / "other", datasets, mirror=mirror)
    said = train(other, f"data.train={datasets}/other/append/train", code=1)
    assert f"{mirror}, step 12: the run was trained on other data than" in said
    assert not list((tmp_path / "other/run/checkpoints").glob("*iter_*"))

    # A set-back tracker is a person's will; a checkpoint that is fetched over is one that another machine has left there.
    (run / "checkpoints" / TRACKER).write_text("8\n")
    said = train(config)
    assert f"it names step 8: continuing from there, not from step 12, which {mirror} has" in said
    assert learned(run) == learned(unbroken)
    (run / "checkpoints" / TRACKER).write_text("8\n")
    (run / "checkpoints" / "mirrored.json").write_text(json.dumps({"mirror": mirror, "step": 8}))
    said = train(config)
    assert "all 12 steps were already done" in said


def test_a_run_starts_from_weights_that_a_url_names(tmp_path: Path, s3: s3fs.S3FileSystem, road: Road, datasets: Path, unbroken: Path) -> None:
    source = "s3://runs/weights/iter_0000012"
    for path in (unbroken / "checkpoints/iter_0000012").iterdir():
        s3.put_file(str(path), f"{source}/{path.name}")
    config = write_config(tmp_path, datasets, load_from=source)
    train(config, "steps=1")
    local = write_config(tmp_path / "local", datasets, load_from=str(unbroken / "checkpoints/iter_0000012"))
    train(local, "steps=1")
    assert learned(tmp_path / "run") == learned(tmp_path / "local/run")
    assert_same_tensors(tmp_path / "run", tmp_path / "local/run")
    s3.pipe("s3://runs/weights/latest_checkpointed_iteration.txt", b"12\n")
    train(config, "steps=1", f"run_dir={tmp_path / 'latest'}", "checkpoint.load_from=s3://runs/weights")
    assert learned(tmp_path / "latest") == learned(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    s3.pipe(f"{source}/common.pt", b"no longer what it was")
    said = train(config, code=1)
    assert "tpt: s3://runs/weights/iter_0000012: what was fetched is not what checksums.json says" in said
    assert not list((tmp_path / "run/load_from").iterdir())
    said = train(config, "checkpoint.load_from=s3://runs/nowhere/iter_0000001", code=1)
    assert "tpt: s3://runs/nowhere/iter_0000001: no complete checkpoint is there (checksums.json is missing)" in said


@pytest.mark.slow
def test_a_kill_within_an_upload_leaves_nothing_that_looks_complete(tmp_path: Path, s3: s3fs.S3FileSystem, road: Road, datasets: Path, unbroken: Path) -> None:
    mirror, run = "s3://runs/killed", tmp_path / "run"
    config = write_config(tmp_path, datasets, mirror=mirror)
    train(config, "steps=4")
    road.bytes_per_s = 30_000
    process = start(config)
    wait_until(process, lambda: any(name.startswith("iter_0000012/") for name in names_of(s3, mirror)))
    family = psutil.Process(process.pid).children(recursive=True)
    assert any("tpt_megatron.mirror" in " ".join(member.cmdline()) for member in family)
    os.kill(process.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(family, timeout=3)
    assert not alive, "an upload outlived its trainer"
    process.communicate()
    known = complete(s3, mirror)[-1]  # step 8's upload may have begun before step 12 was there
    assert known < 12
    assert s3.cat(f"{mirror}/{TRACKER}") == b"%d\n" % known
    assert (run / "checkpoints" / TRACKER).read_text() == "12\n"
    road.bytes_per_s = 1e9

    lost = write_config(tmp_path / "lost", datasets, mirror=mirror)  # with the disk, all after step 4 is gone
    before = {name: s3.cat(f"{mirror}/{name}") for name in names_of(s3, mirror)}
    train(lost)
    assert learned(tmp_path / "lost/run") == learned(unbroken)[known:]
    assert_same_tensors(tmp_path / "lost/run", unbroken)
    assert complete(s3, mirror) == [4, 8, 12]

    s3.rm(mirror, recursive=True)  # or the disk is there, and the store is as the kill left it
    s3.pipe({f"{mirror}/{name}": content for name, content in before.items()})
    said = train(config)
    assert "all 12 steps were already done" in said
    assert_mirrors(s3, mirror, run)
    assert not list((run / "checkpoints").glob(".*"))


def test_the_parts_of_large_uploads_that_were_killed_are_removed(s3: s3fs.S3FileSystem, tmp_path: Path) -> None:
    for key in ("parts/run/iter_0000004/__0_0.distcp", "parts/run-of-another/iter_0000004/__0_0.distcp"):
        s3.call_s3("create_multipart_upload", Bucket="runs", Key=key)
    Mirror(locate("s3://runs/parts/run"), tmp_path).check()
    assert [upload["Key"] for upload in s3.list_multipart_uploads("runs")] == ["parts/run-of-another/iter_0000004/__0_0.distcp"]


def test_training_goes_on_while_the_store_is_gone_and_the_end_says_what_is_missing(
    tmp_path: Path, s3: s3fs.S3FileSystem, road: Road, datasets: Path, unbroken: Path
) -> None:
    mirror, run = "s3://runs/gone", tmp_path / "run"
    config = write_config(tmp_path, datasets, mirror=mirror)
    process = start(config)
    wait_until(process, lambda: (run / "metrics.jsonl").exists())  # the start found the store
    road.is_closed = True
    _, said = process.communicate(timeout=200)
    assert process.returncode == 1, said[-3000:]
    assert f"WARNING  {mirror}: checkpoints could not be copied there (" in said
    last = said.splitlines()[-1]
    assert last.startswith(f"tpt: {mirror}: not all checkpoints are there (")
    assert last.endswith(f"those in {run}/checkpoints are complete: run the same command again to copy them")
    assert "Traceback" not in said
    assert_same_tensors(run, unbroken)
    assert train(config, code=1).splitlines()[-1].startswith(f"tpt: checkpoint.mirror={mirror}: it cannot be written to (")
    road.is_closed = False
    assert "all 12 steps were already done" in train(config)
    assert_mirrors(s3, mirror, run)


@pytest.mark.slow
def test_a_signal_waits_for_the_mirror_and_what_is_not_kept_goes_there_too(tmp_path: Path, s3: s3fs.S3FileSystem, road: Road, datasets: Path) -> None:
    mirror, run = "s3://runs/stopped", tmp_path / "run"
    config = write_config(tmp_path, datasets, mirror=mirror, keep_last=2, asynchronous=True)
    process = start(config, "steps=100000", ranks=2)
    wait_until(process, lambda: len(complete(s3, mirror)) >= 1)
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=300)
    assert "stopped by a signal after saving step" in said, said[-3000:]
    latest = int((run / "checkpoints" / TRACKER).read_text())
    assert s3.cat(f"{mirror}/{TRACKER}") == b"%d\n" % latest
    kept = sorted(int(path.name.removeprefix("iter_")) for path in (run / "checkpoints").glob("iter_*"))
    assert len(kept) == 2
    assert latest in complete(s3, mirror)
    assert len(complete(s3, mirror)) == 2
    shutil.rmtree(run)
    said = train(config, f"steps={latest + 2}", ranks=2)
    assert f"continuing after step {latest}" in said
    before = latest if (latest + 1) % 4 else latest + 1  # every fourth step is saved, too
    assert complete(s3, mirror) == [before, latest + 2]


@pytest.mark.parametrize(
    ("mirror", "code", "says"),
    [
        ("s3://no-such-bucket/run", 1, "checkpoint.mirror=s3://no-such-bucket/run: it cannot be written to ("),
        ("nonsense://bucket/run", 2, "nonsense://bucket/run: Protocol not known"),
        ("{run}/checkpoints", 2, "is where the run's own checkpoints are"),
    ],
)
def test_a_mirror_that_cannot_be_used_is_one_line_before_training(
    tmp_path: Path, s3: s3fs.S3FileSystem, road: Road, datasets: Path, mirror: str, code: int, says: str
) -> None:
    said = train(write_config(tmp_path, datasets, mirror=mirror.format(run=tmp_path / "run")), code=code)
    assert says in said.splitlines()[-1]
    assert not (tmp_path / "run/metrics.jsonl").exists()
