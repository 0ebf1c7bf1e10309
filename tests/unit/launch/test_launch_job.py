"""What `tpt launch` refuses before anything is asked for, in real processes."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.train_runs import write_train_config

OTHERS = {
    "augment.yaml": "input: a.jsonl\noutput: augmented\ngenerator: {kind: worked}\n",
    "preprocess.yaml": "input: a.jsonl\noutput: data\ntokenizer: byte\n",
    "neither.yaml": "input: a\noutput: b\n",
    "options.yaml": "nodes: 4\ngpus_per_node: 2\nslurm: {partition: gpu}\n",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "my configs"
    write_train_config(folder, tmp_path, steps=4)
    for name, text in OTHERS.items():
        (folder / name).write_text(text)
    monkeypatch.chdir(folder)
    return folder


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "tpt_megatron.cli", "launch", *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ("slurm", "train.yaml", "parallel.tensor_parallel=2", "--gpus-per-node=3"),
            "nodes=1 x gpus_per_node=3 = 3 rank(s): parallel.tensor_parallel=2 does not divide the 3 rank(s)",
        ),
        (("slurm", "train.yaml", "--nodes=3", "--gpus-per-node=1"), "global_batch_sequences=4 is not a multiple of micro_batch_sequences=1 x 3"),
        (("slurm", "train.yaml", "steps=many"), "steps='many'"),
        (("slurm", "train.yaml", "launch.nods=3"), "unknown key 'nods'; allowed here: backoff_s,"),
        (("slurm", "train.yaml", "launch.nodes=0"), "nodes=0"),
        (("slurm", "train.yaml", "launch.slurm.time=24:00:00"), 'put the time in quotes: time: "24:00:00"'),
        (("slurm", "train.yaml", "launch.environment={A B: 1}"), "'A B' is no name of a variable"),
        (("slurm", "train.yaml", "launch.environment={A: true}"), "environment.A=true: expected text"),
        (("slurm", "train.yaml", "launch.slurm.time=soon"), "slurm.time: 'soon' is no time of Slurm's; write minutes, minutes:seconds, "),
        (("slurm", "train.yaml", "--gpus-per-node=2", 'launch.slurm.time="2"'), "launch.slurm.time='2' is not longer than launch.stop_s=300"),
        (("slurm", "preprocess.yaml", 'launch.slurm.time="00:05:00"'), "launch.slurm.time='00:05:00' is not longer than launch.stop_s=300"),
        (("slurm", "train.yaml", 'launch.slurm.sbatch={nodes: "3"}'), "slurm.sbatch: the script has 'nodes' already; give nodes instead"),
        (("slurm", "train.yaml", 'launch.slurm.sbatch={no-requeue: ""}'), "slurm.sbatch: the script has 'no-requeue' already; give slurm.max"),
        (("slurm", "train.yaml", "launch.slurm.sbatch={bad opt: x}"), "slurm.sbatch: 'bad opt' is no name of an option"),
        (("slurm", "train.yaml", "launch.container.runtime=apptainer"), "container: runtime is given without image"),
        (("local", "train.yaml", "--gpus-per-node=2", "launch.container.image=i"), "launch.container.image=i: tpt launch local runs ranks as they are"),
        (("local", "preprocess.yaml", "launch.container.image=i"), "launch.container.image=i: tpt launch local runs ranks as they are"),
        (
            ("local", "train.yaml", "--gpus-per-node=2", "launch.logs=/proc/logs", "launch.backoff_s=0"),
            "launch.logs: the folder /proc/logs/attempt_1 cannot be made",
        ),
        (
            ("local", "train.yaml", "--gpus-per-node=2", "launch.logs=options.yaml", "launch.backoff_s=0"),
            "launch.logs: the folder options.yaml/attempt_1 cannot be made",
        ),
        (("slurm", "train.yaml", "launch.name=Tpt"), "name='Tpt' must be of small letters"),
        (("slurm", "neither.yaml"), "neither.yaml: neither a config of train, nor of augment, nor of preprocess: it has input, output"),
        (("slurm", "paper-evaluate"), "recipe paper-evaluate: a config of tpt evaluate, and those of train, augment and preprocess are launched"),
        (("slurm", "demo-experiment"), "a config of tpt experiment, and those of train, augment and preprocess are launched; tpt experiment CONFIG --plan"),
        (("slurm", "no.yaml"), "no.yaml: no such config file"),
        (("slurm", "preprocess.yaml", "shard=1/2"), "tpt launch gives each task its own"),
        (("slurm", "augment.yaml"), "launch.slurm.time is missing, which arrays of augment need"),
        (("local", "augment.yaml", "--nodes=2"), "start it on each machine by itself"),
        (("local", "train.yaml", "--nodes=2", "--gpus-per-node=1"), "give launch.local.rendezvous=HOST:PORT"),
        (("local", "train.yaml", "--nodes=2", "--gpus-per-node=1", "launch.local.rendezvous=hosty"), "local.rendezvous: 'hosty' must be HOST:PORT"),
        (("local", "train.yaml", "--nodes=2", "--gpus-per-node=1", "launch.local.node=2"), "local.node=2 must be less than nodes=2"),
        (("kubernetes", "train.yaml", "--gpus-per-node=1"), "launch.container.image is missing"),
        (("kubernetes", "train.yaml", "--gpus-per-node=1", "launch.container={image: a, mounts: [/x]}"), "launch.container.mounts are Slurm's"),
        (("kubernetes", "train.yaml", "launch.kubernetes.claims={data: data}"), "kubernetes.claims: data='data' must be a full path"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(folder: Path, arguments: tuple[str, ...], says: str) -> None:
    ended = launch(*arguments)
    assert ended.returncode == 2, ended.stderr
    assert says in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert ended.stdout == ""


@pytest.mark.parametrize("config", ["train.yaml", "preprocess.yaml", "augment.yaml"])
def test_logs_that_cannot_be_are_refused_before_anything_is_submitted(folder: Path, monkeypatch: pytest.MonkeyPatch, config: str) -> None:
    sbatch = folder / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text("#!/bin/sh\ntouch submitted\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", str(sbatch.parent), prepend=os.pathsep)
    (folder / "a.jsonl").write_text('{"text": "a"}\n')
    ended = launch("slurm", config, "--gpus-per-node=2", 'launch.slurm={partition: p, time: "1:00:00"}', "launch.logs=options.yaml")
    assert (ended.returncode, ended.stderr) == (
        2,
        "tpt: launch.logs: the folder options.yaml cannot be made (File exists); name one that can be written to\n",
    )
    assert not (folder / "submitted").exists()


def test_flags_count_over_a_file_of_options_and_words_over_both(folder: Path) -> None:
    def ranks(*more: str) -> list[str]:
        ended = launch("slurm", "train.yaml", "--dry-run", "--options=options.yaml", *more)
        assert ended.returncode == 0, ended.stderr
        return [word for word in ("--nodes=4", "--nodes=2", "--ranks=2", "--ranks=1", "--partition=gpu", "--partition=h100") if word in ended.stdout]

    assert ranks("global_batch_sequences=8") == ["--nodes=4", "--ranks=2", "--partition=gpu"]
    assert ranks("--nodes=2", "launch.slurm.partition=h100") == ["--nodes=2", "--ranks=2", "--partition=h100"]
    assert ranks("--nodes=2", "launch.gpus_per_node=1") == ["--nodes=2", "--ranks=1", "--partition=gpu"]


def test_what_local_would_run_is_a_line_for_a_shell(folder: Path) -> None:
    ended = launch("local", "train.yaml", "--gpus-per-node=2", "--dry-run", "launch.logs=my logs", "launch.environment={A: x y, B: 1}", "run_dir=a b")
    assert ended.stderr == ""
    first, second, *words = shlex.split(ended.stdout)
    assert (first, second) == ("A=x y", "B=1")
    assert words[1:] == [
        *("-m", "tpt_megatron.launch.agent", "--ranks=2", "--stop-s=300", "--logs=my logs/attempt_1", "--"),
        *("train", str(folder / "train.yaml"), "run_dir=a b"),
    ]
    assert shlex.split(launch("local", "preprocess.yaml", "--dry-run").stdout)[1:] == ["-m", "tpt_megatron.cli", "preprocess", str(folder / "preprocess.yaml")]
    assert list(folder.glob("my logs")) == [], "a dry run made something"


@pytest.mark.parametrize("where", ["local", "slurm", "kubernetes"])
def test_a_dry_run_needs_no_torch(folder: Path, where: str) -> None:
    code = "import sys; from tpt_megatron.cli import main\ntry: main()\nexcept SystemExit: pass\nsys.exit('torch' in sys.modules)"
    words = ["launch", where, "train.yaml", "--dry-run", "--gpus-per-node=2", *(["launch.container.image=image"] if where == "kubernetes" else [])]
    assert subprocess.run([sys.executable, "-c", code, *words], check=False, capture_output=True).returncode == 0


def test_where_there_is_no_cluster_it_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    ended = launch("slurm", "train.yaml", "--gpus-per-node=2")
    assert (ended.returncode, ended.stderr) == (
        1,
        "tpt: slurm: there is no sbatch on this machine; submit from a login node, or see the script with --dry-run\n",
    )
    ended = launch("kubernetes", "train.yaml", "--gpus-per-node=2", "launch.container.image=image")
    assert ended.returncode == 1
    assert ended.stderr.startswith("tpt: kubernetes: there is no kubectl on this machine;")


def test_help_says_where_options_are_listed(folder: Path) -> None:
    said = " ".join(launch("--help").stdout.split())
    assert "Its options, each also `launch.KEY=VALUE`: `tpt keys launch`. docs/launch.md says the rest." in said
