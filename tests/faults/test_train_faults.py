"""What goes wrong around a training run: signals, damaged checkpoints, other data, another model. Real processes."""

import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.support.disks import small_disk
from tests.support.metrics import learned
from tests.support.ranks import WarmRanks
from tests.support.tensors import assert_same_tensors
from tests.support.token_files import write_token_files
from tests.support.train_runs import preprocess_corpus, write_train_config
from tpt_megatron.config.load import load_config
from tpt_megatron.config.train import TrainConfig
from tpt_megatron.convert.checkpoint_reader import CheckpointReader, find_checkpoint
from tpt_megatron.datasets import open_dataset
from tpt_megatron.sequences.stream import Stream
from tpt_megatron.train.data import open_run_data

STEPS = 12


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two datasets, `datasets/append/train` of one corpus and `other/append/train` of another."""
    root = tmp_path_factory.mktemp("data")
    for name, seed in (("datasets", 1), ("other", 2)):
        preprocess_corpus(root, name, seed)
    return root


def write_config(folder: Path, datasets: Path, **changes: Any) -> Path:
    return write_train_config(folder, datasets, **{"steps": STEPS, "checkpoint": {"every_steps": 4}, **changes})


Train = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def train(warm_ranks: WarmRanks) -> Train:
    """Run `tpt train CONFIG key=value ...` to its end, in a process of its own."""
    return lambda config, *overrides: warm_ranks.run("train", str(config), *overrides)


def losses(folder: Path) -> list[tuple[int, float, float]]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [(line["step"], line["loss"], line["gradient_norm"]) for line in map(json.loads, lines)]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, datasets: Path, train: Train) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    ended = train(write_config(folder, datasets))
    assert ended.returncode == 0, ended.stderr[-3000:]
    return folder


def copy_of(run: Path, folder: Path) -> Path:
    shutil.copytree(run, folder, dirs_exist_ok=True)
    return folder


def rewind(folder: Path, step: int) -> None:
    (folder / "run" / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(f"{step}\n")


def test_a_resumed_run_repeats_the_unbroken_one_bit_for_bit(tmp_path: Path, datasets: Path, unbroken: Path, train: Train) -> None:
    copy_of(unbroken, tmp_path)
    rewind(tmp_path, 8)
    config = write_config(tmp_path, datasets)
    assert train(config).returncode == 0
    assert losses(tmp_path) == losses(unbroken)
    assert len(json.loads((tmp_path / "run" / "run.json").read_text())["sessions"]) == 2


def test_sigterm_saves_and_exits_3_and_the_same_command_continues(tmp_path: Path, datasets: Path, unbroken: Path, train: Train) -> None:
    # So many steps that the signal comes in the middle; the schedule is constant, so the first ones equal the unbroken run's.
    config = write_config(tmp_path, datasets, steps=100_000)
    command = [sys.executable, "-m", "tpt_megatron.cli", "train", str(config)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert process.poll() is None
        assert time.monotonic() < deadline, "no step was taken"
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 3
    assert "run the same command again to continue" in stderr
    saved = int((tmp_path / "run" / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
    assert losses(tmp_path)[-1][0] == saved
    ended = train(config, f"steps={saved + 2}")
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = losses(tmp_path)
    assert [step for step, _, _ in found] == list(range(1, saved + 3))
    shared = min(len(found), STEPS)
    assert found[:shared] == losses(unbroken)[:shared]


def damage_tracker(run: Path) -> None:
    (run / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("garbage")


def remove_marker(run: Path) -> None:
    (run / "checkpoints" / f"iter_{STEPS:07d}" / "metadata.json").unlink()


def cut_off_shard(run: Path) -> None:
    shard = max((run / "checkpoints" / f"iter_{STEPS:07d}").glob("*.distcp"), key=lambda path: path.stat().st_size)
    os.truncate(shard, shard.stat().st_size // 2)


def flip_a_byte(run: Path) -> None:
    shard = max((run / "checkpoints" / f"iter_{STEPS:07d}").glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1  # in the middle of weights: it loads without a word
    shard.write_bytes(content)


def garble_checksums(run: Path) -> None:
    (run / "checkpoints" / f"iter_{STEPS:07d}" / "checksums.json").write_text("[]]")


def garble_description(run: Path) -> None:
    (run / "checkpoints" / f"iter_{STEPS:07d}" / "tpt.json").write_text("{")


def remove_folder(run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / f"iter_{STEPS:07d}")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (damage_tracker, "expected a step number, found 'garbage'"),
        (remove_marker, "not a complete checkpoint"),
        (cut_off_shard, "the file is damaged: it has "),
        (flip_a_byte, "the file is damaged: its SHA-256 is not the one in checksums.json"),
        (garble_checksums, "checksums.json: not a list of files and their checksums"),
        (garble_description, "tpt.json: the file is damaged"),
        (remove_folder, "no such checkpoint"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path: Path, datasets: Path, unbroken: Path, damage: Any, says: str, train: Train) -> None:
    copy_of(unbroken, tmp_path)
    damage(tmp_path / "run")
    ended = train(write_config(tmp_path, datasets, steps=STEPS + 1))
    assert ended.returncode == 1
    assert says in ended.stderr
    assert str(tmp_path / "run" / "checkpoints") in ended.stderr
    assert "Traceback" not in ended.stderr
    assert losses(tmp_path) == losses(unbroken)
    if damage is not damage_tracker:
        assert "the complete one before it is of step 8: write 8 into" in ended.stderr


def test_the_way_out_of_a_flipped_byte_leads_to_the_unbroken_run(tmp_path: Path, datasets: Path, unbroken: Path, train: Train) -> None:
    copy_of(unbroken, tmp_path)
    flip_a_byte(tmp_path / "run")
    rewind(tmp_path, 8)
    assert train(write_config(tmp_path, datasets)).returncode == 0
    assert losses(tmp_path) == losses(unbroken)
    assert_same_tensors(tmp_path / "run", unbroken / "run")


def test_a_checkpoint_without_checksums_or_scaling_still_loads(tmp_path: Path, datasets: Path, unbroken: Path, train: Train) -> None:
    copy_of(unbroken, tmp_path)
    rewind(tmp_path, 8)
    folder = tmp_path / "run" / "checkpoints" / "iter_0000008"
    (folder / "checksums.json").unlink()
    # Transformer Engine's scaling, which one that was written on other layers has for fewer modules, or for none.
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    weights = {key: value for key, value in metadata.state_dict_metadata.items() if "_extra_state" not in key}
    assert len(weights) < len(metadata.state_dict_metadata)
    metadata.state_dict_metadata = weights
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    ended = train(write_config(tmp_path, datasets))
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "it has no checksums.json, as the oldest checkpoints have none; loaded without verifying it" in ended.stderr
    assert losses(tmp_path) == losses(unbroken)


def test_retention_deletes_what_need_not_be_kept_and_the_best_survives_a_restart(tmp_path: Path, datasets: Path, train: Train) -> None:
    data = {"train": str(datasets / "datasets/append/train"), "validation": str(datasets / "other/append/train"), "sequence_length": 32}
    rules = {"every_steps": 1, "keep_last": 2, "keep_every_steps": 5, "keep_best": 1}
    config = write_config(tmp_path, datasets, data=data, checkpoint=rules, validate_every_steps=1)
    for steps, rate in ((8, 0.01), (13, 1.0)):  # the second rate makes it worse
        ended = train(config, f"steps={steps}", f"optimizer.learning_rate={rate}")
        assert ended.returncode == 0, ended.stderr[-3000:]
        lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
        losses_by_step = {line["step"]: line["validation_loss"] for line in lines}
        best = min(losses_by_step, key=losses_by_step.__getitem__)
        expected = {best, *range(5, steps + 1, 5), steps - 1, steps}
        found = {int(path.name.removeprefix("iter_")) for path in (tmp_path / "run" / "checkpoints").glob("iter_*")}
        assert found == expected
    assert best <= 8, "the best is not of before the restart: nothing was tested"
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def test_a_run_may_start_from_weights_alone_with_a_fresh_optimizer(tmp_path: Path, datasets: Path, unbroken: Path, train: Train) -> None:
    source = unbroken / "run" / "checkpoints" / f"iter_{STEPS:07d}"
    found = {}
    for load in ("weights", "all"):
        folder = tmp_path / load
        folder.mkdir()
        # A rate so small that one step changes next to nothing: the checkpoint after it shows what was loaded.
        ended = train(write_config(folder, datasets), f"checkpoint.load_from={source}", f"checkpoint.load={load}", "steps=1", "optimizer.learning_rate=1e-9")
        assert ended.returncode == 0, ended.stderr[-3000:]
        found[load] = CheckpointReader(find_checkpoint(folder / "run"))
    original = CheckpointReader(source)
    moments = next(key for key in original.tensors if "exp_avg_sq" in key and "embedding" in key)
    for key in original.tensors:
        if not key.startswith("optimizer."):
            torch.testing.assert_close(found["weights"].read(key), original.read(key), atol=1e-6, rtol=0)
    assert found["all"].read(moments).sum() > 3 * found["weights"].read(moments).sum(), "the optimizer was not fresh"


def test_weights_of_one_precision_start_a_run_in_another_and_go_back(tmp_path: Path, datasets: Path, unbroken: Path, train: Train) -> None:
    read, source = {"fp32": CheckpointReader(unbroken / "run" / "checkpoints" / f"iter_{STEPS:07d}")}, unbroken
    for precision in ("bf16", "fp32"):
        folder = tmp_path / precision
        folder.mkdir()
        start = (f"checkpoint.load_from={find_checkpoint(source / 'run')}", f"precision={precision}", "steps=1", "optimizer.learning_rate=1e-9")
        refused = train(write_config(folder, datasets), *start)
        assert refused.returncode == 1
        assert f"the config says precision={precision}" in refused.stderr
        ended = train(write_config(folder, datasets), *start, "checkpoint.load=weights")
        assert ended.returncode == 0, ended.stderr[-3000:]
        read[f"from {source.name}"], source = CheckpointReader(find_checkpoint(folder / "run")), folder
    first, in_bf16, back = read.values()
    weights = [key for key in first.tensors if not key.startswith("optimizer.") and "_extra_state" not in key]
    assert weights
    for key in weights:
        rounded = first.read(key).bfloat16()
        # The rate is so small that one step changes none but the smallest weights.
        torch.testing.assert_close(in_bf16.read(key), rounded, atol=1e-8, rtol=0)
        torch.testing.assert_close(back.read(key), rounded.float(), atol=1e-8, rtol=0)
        # The optimizer of the run in bf16 has its own copy in fp32, which began at the weights.
        torch.testing.assert_close(in_bf16.read(f"optimizer.state.param.{key}"), rounded.float(), atol=1e-8, rtol=0)


def test_bf16_resumes_bit_for_bit_and_writing_behind_its_back_changes_nothing(tmp_path: Path, datasets: Path, train: Train) -> None:
    model = {"num_layers": 1, "hidden_size": 16, "ffn_hidden_size": 32, "num_heads": 2, "num_query_groups": 2}
    folders = [tmp_path / name for name in ("unbroken", "stopped")]
    for folder, stops in zip(folders, ([4], [1, 4]), strict=True):
        folder.mkdir()
        config = write_config(folder, datasets, model=model, precision="bf16", checkpoint={"every_steps": 1, "asynchronous": len(stops) > 1})
        for steps in stops:
            ended = train(config, f"steps={steps}")
            assert ended.returncode == 0, ended.stderr[-3000:]
    assert losses(folders[0]) == losses(folders[1])
    assert_same_tensors(folders[0] / "run", folders[1] / "run")


@pytest.mark.parametrize(
    ("overrides", "code", "says"),
    [
        (("model.ffn_hidden_size=96",), 1, "the checkpoint has model.ffn_hidden_size=80, the config 96"),
        (("data.train={root}/other/append/train",), 1, "was trained on other data"),
        (("seed=5",), 1, "was trained on other data"),
        (("data.packing=best_fit",), 1, "was trained on other data than {root}/datasets/append/train as this config reads it (packing)"),
        (("precision=bf16",), 1, "the checkpoint was trained in fp32"),
        (("global_batch_sequences=6", "micro_batch_sequences=4"), 2, "global_batch_sequences=6 is not a multiple of"),
    ],
)
def test_what_does_not_continue_the_run_is_refused(
    tmp_path: Path, datasets: Path, unbroken: Path, overrides: tuple[str, ...], code: int, says: str, train: Train
) -> None:
    copy_of(unbroken, tmp_path)
    ended = train(write_config(tmp_path, datasets, steps=STEPS + 1), *(override.format(root=datasets) for override in overrides))
    assert ended.returncode == code
    assert says.format(root=datasets) in ended.stderr
    assert "Traceback" not in ended.stderr
    assert losses(tmp_path) == losses(unbroken)


def test_a_blend_in_stages_packed_and_validated_by_name_goes_on_as_if_unbroken(tmp_path: Path, datasets: Path, train: Train) -> None:
    one, other = (str(datasets / name / "append" / "train") for name in ("datasets", "other"))
    shares = [{"path": one, "weight": 0.7}, {"path": other, "weight": 0.3, "max_epochs": 2}]
    data = {
        "stages": [{"tokens": 10 * 128, "train": shares}, {"train": other}],
        "validation": {"one": one, "other": other},
        "sequence_length": 128,
        "packing": "best_fit",
        "loss_weights": {"thinking": 0.5},
    }
    config = write_config(tmp_path, datasets, data=data, steps=4, checkpoint={"every_steps": 2}, validate_every_steps=2)
    ended = train(config)
    assert ended.returncode == 0, ended.stderr[-3000:]

    unbroken = learned(tmp_path / "run")
    validated = {f"{name}/{of}" for name in ("validation_loss", "validation_loss_document", "validation_loss_thinking") for of in ("one", "other")}
    assert [{*line} & validated for line in unbroken] == [set(), validated, set(), validated]
    loaded = load_config(TrainConfig, str(config))
    stream = Stream(loaded.data, loaded.data.blends, {path: open_dataset(path) for path in (one, other)}, loaded.seed)
    labels = [sum(seen.tokens for seen in stream.documents(range(4 * step))) - 4 * step for step in range(1, 5)]
    assert [line["tokens_seen"] for line in unbroken] == labels  # of each sequence all but the first token and the padding
    assert labels[-1] < 16 * 128
    rewind(tmp_path, 2)
    assert train(config).returncode == 0
    assert learned(tmp_path / "run") == unbroken
    shown = subprocess.run(
        [sys.executable, "-m", "tpt_megatron.cli", "inspect", str(tmp_path / "run"), "--step", "3"], capture_output=True, text=True, check=True
    )
    rows = [line.split() for line in shown.stdout.splitlines() if "/append/train" in line]
    assert {int(row[1]) for row in rows} == {8, 9, 10, 11}
    assert all(row[0] == other for row in rows if int(row[1]) >= 10)


USUAL, ODD = 400, 4


@pytest.fixture(scope="module")
def spiky(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of documents that are soon learned, and at its end of some that are like nothing else."""
    root, letters = tmp_path_factory.mktemp("spiky"), random.Random(1)
    texts = ["abababab" * 8] * USUAL + ["".join(map(chr, letters.choices(range(33, 127), k=64))) for _ in range(ODD)]
    (root / "documents.jsonl").write_text("".join(json.dumps({"text": text, "thoughts": []}) + "\n" for text in texts))
    (root / "preprocess.yaml").write_text(f"input: {root}/documents.jsonl\noutput: {root}/datasets\ntokenizer: byte\narms: [vanilla]\n")
    subprocess.run([sys.executable, "-m", "tpt_megatron.cli", "preprocess", str(root / "preprocess.yaml")], check=True, capture_output=True)
    return root / "datasets/vanilla/train"


def test_spikes_are_skipped_recorded_and_judged_alike_after_a_resume(tmp_path: Path, datasets: Path, spiky: Path, train: Train) -> None:
    data, faults = {"train": str(spiky), "sequence_length": 32}, {"spike_factor": 5}
    config = write_config(tmp_path, datasets, data=data, faults=faults, steps=200, checkpoint={"every_steps": 10}, optimizer={"learning_rate": 1e-3})
    ended = train(config)
    assert ended.returncode == 0, ended.stderr[-3000:]
    lines = learned(tmp_path / "run")
    skipped = {line["step"]: line["skipped"] for line in lines if "skipped" in line}
    assert skipped, "nothing was skipped: nothing was tested"
    assert all("times the median of the last" in reason for reason in skipped.values())
    records = [json.loads(line) for line in (tmp_path / "run/skipped.jsonl").read_text().splitlines()]
    assert {record["step"]: record["reason"] for record in records} == skipped
    assert len(records) == len(skipped)
    assert all(any(seen["document"] >= USUAL for seen in record["documents"]) for record in records)
    assert all(f"step {step} is not learned from: {reason}" in ended.stderr for step, reason in skipped.items())
    resumed_at = max(skipped) // 10 * 10
    rewind(tmp_path, resumed_at)
    assert train(config).returncode == 0
    assert learned(tmp_path / "run") == lines
    assert [json.loads(line) for line in (tmp_path / "run/skipped.jsonl").read_text().splitlines()] == records


def test_a_run_that_is_lost_goes_back_once_and_on_with_later_data(tmp_path: Path, datasets: Path, spiky: Path, train: Train) -> None:
    data, faults = {"train": str(spiky), "sequence_length": 32}, {"spike_factor": 50, "skips_in_a_row": 1}
    config = write_config(tmp_path, datasets, data=data, faults=faults, steps=1000, checkpoint={"every_steps": 10}, optimizer={"learning_rate": 3e-3})
    ended = train(config)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert "after 1 rollback(s); lower optimizer.learning_rate, or look at the documents in skipped.jsonl" in ended.stderr
    first, second = (json.loads(line) for line in (tmp_path / "run/skipped.jsonl").read_text().splitlines())
    back = first["step"] // 10 * 10
    assert f"back to step {back}, and on with the data after step {first['step']}" in ended.stderr
    lines = learned(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, second["step"] + 1))
    assert lines[back]["first_sequence"] == first["sequences"][1]
    assert second["sequences"][0] == 4 * (second["step"] - 1) + 4 * (first["step"] - back)
    # Another start goes on from the last checkpoint, which remembers what was passed over.
    saved = int((tmp_path / "run/checkpoints/latest_checkpointed_iteration.txt").read_text())
    assert saved > back, "there is no checkpoint of after it went back: nothing would be tested"
    assert train(config, f"steps={saved + 1}", "faults.spike_factor=null").returncode == 0
    again = learned(tmp_path / "run")[-1]
    assert (again["step"], again["first_sequence"]) == (saved + 1, 4 * saved + 4 * (first["step"] - back))


@pytest.fixture
def easily_lost(tmp_path: Path, datasets: Path) -> Path:
    """A config by which, from step 21 on, every other step is a spike, and two in a row are too many; each is followed by a checkpoint."""
    faults, checkpoint = {"spike_factor": 1.0001, "skips_in_a_row": 2}, {"every_steps": 1, "keep_last": 2}
    return write_config(tmp_path, datasets, faults=faults, steps=100, checkpoint=checkpoint, optimizer={"learning_rate": 1e-6})


def test_a_lost_run_goes_back_to_before_its_lost_steps_also_when_these_were_saved_and_resumed(tmp_path: Path, easily_lost: Path, train: Train) -> None:
    ended = train(easily_lost)
    assert ended.returncode == 1, "it was never lost a second time"
    skipped = [json.loads(line)["step"] for line in (tmp_path / "run/skipped.jsonl").read_text().splitlines()]
    first, second = next((one, other) for one, other in pairwise(skipped) if other == one + 1)
    assert f"back to step {first - 1}, and on with the data after step {second}" in ended.stderr
    (tmp_path / "again").mkdir()
    again = train(easily_lost, f"run_dir={tmp_path / 'again'}", f"steps={first}", "watch.log_every_steps=1000")
    assert again.returncode == 0, again.stderr[-3000:]
    assert (tmp_path / "again/checkpoints/latest_checkpointed_iteration.txt").read_text() == f"{first}\n", "it did not stop among the lost steps"
    again = train(easily_lost, f"run_dir={tmp_path / 'again'}")
    assert f"back to step {first - 1}, and on with the data after step {second}" in again.stderr
    assert f"the config is not the last session's: watch.log_every_steps 1000 -> 1, steps {first} -> 100" in again.stderr
    assert learned(tmp_path / "again") == learned(tmp_path / "run")


def test_going_back_does_not_read_a_dataset_more_often_than_it_may(tmp_path: Path, easily_lost: Path, train: Train) -> None:
    path = load_config(TrainConfig, easily_lost).data.train_paths[0]
    held = open_run_data(load_config(TrainConfig, easily_lost)).train.stream.sequences_per_epoch(path)
    just_enough = {"path": path, "max_epochs": 100 * 4 / held + 1e-9}
    ended = train(easily_lost, f"data.train={json.dumps(just_enough)}")
    assert ended.returncode == 2, ended.stderr[-3000:]
    last = ended.stderr.splitlines()[-1]
    assert re.search(r"with the \d+ sequences that are passed over since the run went back: .*over its max_epochs", last), last


def test_a_second_run_in_the_same_folder_is_refused_until_the_first_is_gone(tmp_path: Path, datasets: Path) -> None:
    config = write_config(tmp_path, datasets, steps=100_000, checkpoint={"every_steps": 5})
    command = [sys.executable, "-m", "tpt_megatron.cli", "train", str(config)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as first:
        while not (tmp_path / "run/checkpoints/iter_0000005").exists():
            assert first.poll() is None
            time.sleep(0.1)
        second = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (second.returncode, first.poll()) == (2, None)
        assert second.stderr == f"tpt: run_dir={tmp_path / 'run'}: another run is at work there; wait for its end, stop it, or give another run_dir\n"
        first.kill()
        first.communicate()
    last = int((tmp_path / "run/checkpoints/latest_checkpointed_iteration.txt").read_text())
    third = subprocess.run([*command, f"steps={last + 1}"], capture_output=True, text=True, check=False)
    assert third.returncode == 0, third.stderr[-3000:]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_disk_that_is_full_at_a_save_is_one_line_and_the_checkpoint_before_stands(
    tmp_path: Path, datasets: Path, unbroken: Path, train: Train, asynchronous: bool
) -> None:
    with small_disk(tmp_path / "disk", 1) as disk:
        config = write_config(tmp_path, datasets, run_dir=str(disk / "run"), checkpoint={"every_steps": 4, "asynchronous": asynchronous})
        ended = train(config)
        assert ended.returncode == 1
        assert "Traceback" not in ended.stderr
        last = ended.stderr.splitlines()[-1]
        assert f"tpt: {disk / 'run/checkpoints'}" in last
        assert "MB are free there)" in last or "No space left on device" in last
        assert (disk / "run/checkpoints/latest_checkpointed_iteration.txt").read_text() == "4\n"
        subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
        assert train(config).returncode == 0
        assert learned(disk / "run") == learned(unbroken / "run")


def test_a_stalled_rank_is_found_and_ends_the_job(tmp_path: Path, datasets: Path) -> None:
    config = write_config(tmp_path, datasets, steps=100_000, faults={"stall_seconds": 8})
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tpt_megatron.cli", "train", str(config)]
    process = subprocess.Popen(torchrun, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    metrics = tmp_path / "run/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert process.poll() is None
        assert time.monotonic() < deadline, "no step was taken"
        time.sleep(0.05)
    stalled, other = psutil.Process(process.pid).children()
    stalled.suspend()  # as a rank whose machine hangs: it can say nothing itself
    _, stderr = process.communicate(timeout=90)
    assert process.returncode == 1
    written = list((tmp_path / "run/stalls").iterdir())
    assert len(written) == 1  # of the rank that waits; the other one has no turn to write
    assert "took more than 8 s" in written[0].read_text()
    assert "torch/distributed" in written[0].read_text()  # it waits for the other
    assert "took more than faults.stall_seconds=8; its stacks are in" in stderr
    psutil.wait_procs([stalled, other], timeout=30)


def test_what_a_crash_left_of_a_save_is_cleaned_up(tmp_path: Path, datasets: Path, unbroken: Path, train: Train) -> None:
    copy_of(unbroken, tmp_path)
    leftover = tmp_path / "run" / "checkpoints" / ".iter_0000099.tmp"
    leftover.mkdir()
    assert train(write_config(tmp_path, datasets, steps=STEPS + 1)).returncode == 0
    assert not leftover.exists()


def test_a_diverging_run_stops_in_one_line_and_saves_nothing(tmp_path: Path, datasets: Path, train: Train) -> None:
    ended = train(write_config(tmp_path, datasets), "optimizer.learning_rate=1e30", "optimizer.clip_gradient_norm=0")
    assert ended.returncode == 1
    assert "lower optimizer.learning_rate" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not list((tmp_path / "run" / "checkpoints").glob("iter_*"))


def test_a_vocabulary_smaller_than_a_bare_datasets_tokens_is_refused(tmp_path: Path, datasets: Path, train: Train) -> None:
    for ending in ("bin", "idx"):
        shutil.copy(datasets / "datasets" / "append" / f"train.{ending}", tmp_path / f"bare.{ending}")
    config = write_config(tmp_path, datasets)
    ended = train(config, f"data.train={tmp_path / 'bare'}", "model.vocab_size=64")
    assert ended.returncode == 2
    assert "model.vocab_size=64 is smaller than the vocabulary" in ended.stderr
    assert train(config, f"data.train={tmp_path / 'bare'}", "model.vocab_size=257", "steps=2").returncode == 0


def test_a_validation_set_of_a_larger_vocabulary_is_refused_before_the_first_step(tmp_path: Path, datasets: Path, train: Train) -> None:
    write_token_files(tmp_path / "other", [([300 + number % 80] * 40, [], None) for number in range(40)], sidecars=False)
    ended = train(
        write_config(tmp_path, datasets), "model.vocab_size=257", f"data.validation={tmp_path / 'other'}", "validate_every_steps=2", "validation_batches=1"
    )
    assert ended.returncode == 2
    assert f"model.vocab_size=257 is smaller than the vocabulary of {tmp_path / 'other'}, 340" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_an_unwritable_run_folder_is_one_line(tmp_path: Path, datasets: Path, train: Train) -> None:
    (tmp_path / "run").write_text("a file")
    ended = train(write_config(tmp_path, datasets))
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1] == f"tpt: run_dir={tmp_path}/run: no folder can be made there (File exists); give another run_dir"
    assert "Traceback" not in ended.stderr
    assert (tmp_path / "run").read_text() == "a file"
