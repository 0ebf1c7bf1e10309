import subprocess
import sys
from pathlib import Path

CODE = """
import sys, time
from pathlib import Path
from tpt_megatron.train.watchdog import Watchdog

def compute_for_ever():
    while True:
        time.sleep(0.01)

with Watchdog(float(sys.argv[1]), Path(sys.argv[2]), 3) as watchdog:
    for number in range(6):
        watchdog.step(f"step {number}")
        time.sleep(0.3)
    if sys.argv[3] == "stall":
        compute_for_ever()
"""


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", CODE, words[0], str(folder), words[1]], capture_output=True, text=True, timeout=60, check=False)


def test_a_stall_ends_the_process_with_its_stacks_written_down(tmp_path: Path) -> None:
    ended = run(tmp_path / "stalls", "4", "stall")
    assert ended.returncode == 1
    assert ended.stderr == f"rank 3: step 5 took more than faults.stall_seconds=4; its stacks are in {tmp_path / 'stalls/rank-00003.txt'}\n"
    assert "in compute_for_ever" in (tmp_path / "stalls/rank-00003.txt").read_text()


def test_steps_that_end_in_time_are_left_alone(tmp_path: Path) -> None:
    ended = run(tmp_path / "stalls", "4", "go on")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert not (tmp_path / "stalls").exists()
    assert run(tmp_path / "stalls", "0", "go on").returncode == 0
