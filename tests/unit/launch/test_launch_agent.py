from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.train_runs import write_train_config
from tpt_megatron.launch.agent import exit_code


@pytest.mark.parametrize(
    ("ended", "code"),
    [
        ([], 0),
        ([0, 0], 0),
        ([3, 3], 3),
        ([3, -15], 3),  # one ended first, and the agent ended the other
        ([2, -15, 3], 2),
        ([1, 3], 1),
        ([3, 1], 1),
        ([1, -9], 137),
        ([-9, 3], 137),
        ([-6, 1], 134),
        ([2, -9], 2),  # it hung when the other one refused
        ([-15, -15], 143),
    ],
)
def test_a_node_exits_as_its_ranks_ended(ended: list[int], code: int) -> None:
    assert exit_code(ended) == code


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "tpt_megatron.launch.agent", *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--ranks=1",), "give what to run after --"),
        (("--ranks=1", "--nodes=2", "--", "train", "x"), "--nodes needs --rendezvous"),
        (("--ranks=1", "--node-variable=NO_SUCH", "--", "train", "x"), "the variable NO_SUCH should have a number, and has ''"),
    ],
)
def test_wrong_arguments_are_refused(arguments: tuple[str, ...], says: str) -> None:
    ended = run(*arguments)
    assert ended.returncode == 2
    assert says in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_rendezvous_that_is_no_address_is_one_line() -> None:
    ended = run("--ranks=1", "--nodes=2", "--rendezvous=nowhere", "--", "train", "x")
    assert (ended.returncode, ended.stderr) == (2, "tpt launch: rendezvous=nowhere: expected HOST:PORT\n")


def test_logs_that_cannot_be_made_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ended = run("--ranks=1", f"--logs={tmp_path}/file/attempt_1", "--", "train", "x")
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr == f"tpt launch: launch.logs: the folder {tmp_path}/file/attempt_1 cannot be made (Not a directory); name one that can be written to\n"


def test_wrong_configs_and_failures_are_told_apart_for_schedulers_that_want_codes_of_their_own(tmp_path: Path) -> None:
    wrong = run("--ranks=2", "--failed-exit-code=130", "--", "train", "no-such-config")
    assert wrong.returncode == 2, wrong.stderr
    assert "no-such-config: no such config file" in wrong.stderr
    failed = run("--ranks=2", "--failed-exit-code=130", f"--logs={tmp_path}/my logs", "--", "train", str(write_train_config(tmp_path, tmp_path, steps=1)))
    assert failed.returncode == 130, failed.stderr
    said = re.match(r"tpt launch: rank ([01]) ended with exit code 1; (.+?\.log): tpt: .*train\.idx: no such file", failed.stderr)  # whichever was the first
    assert said is not None, failed.stderr
    assert said[2] == f"{tmp_path}/my logs/rank_{said[1]}.log" and "train.idx: no such file" in Path(said[2]).read_text()
