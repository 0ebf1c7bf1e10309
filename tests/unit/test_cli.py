"""The command line as a user meets it: a real process for every case."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

TRAIN = """
run_dir: {folder}/run
model: {{num_layers: 2, hidden_size: 32, ffn_hidden_size: 80, num_heads: 4, num_query_groups: 2}}
data: {{train: {folder}/nothing, sequence_length: 16}}
optimizer: {{learning_rate: 1.0e-3}}
steps: 2
global_batch_sequences: 2
"""


def tpt(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tpt_megatron.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env={**os.environ, **variables})


def test_importing_the_command_line_loads_no_torch() -> None:
    code = "import sys, tpt_megatron.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "module", ["augment.runner", "preprocess.runner", "config.train", "demo.run", "compare.curves", "launch.submit", "launch.slurm_arrays", "launch.kubernetes"]
)
def test_rooms_that_promise_it_load_no_torch(module: str) -> None:
    code = f"import sys, tpt_megatron.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "command",
    [
        [],
        *([name] for name in ("augment", "preprocess", "train", "evaluate", "losses", "value", "compare", "demo", "doctor", "launch", "plan", "keys")),
        ["convert", "export"],
    ],
)
def test_every_command_has_help(command: list[str]) -> None:
    ended = tpt(*command, "--help")
    assert ended.returncode == 0
    assert "Usage:" in ended.stdout


@pytest.mark.parametrize("stage", ["augment", "preprocess", "train", "evaluate", "losses", "value", "experiment", "launch"])
def test_keys_of_every_stage_are_listed(stage: str) -> None:
    ended = tpt("keys", stage)
    assert ended.returncode == 0
    assert ("nodes: int (default 1)" if stage == "launch" else "(required)") in ended.stdout  # launch needs no key


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("model.hidden_sise=32", "unknown key 'model.hidden_sise'; allowed here:"),
        ("steps=many", "steps='many'"),
        ("model.num_heads=5", "hidden_size=32 is not divisible by num_heads=5"),
        ("parallel.tensor_parallel=4", "parallel.tensor_parallel=4 does not divide model.num_query_groups=2"),
        ("parallel.pipeline_parallel=3", "parallel.pipeline_parallel=3 does not divide model.num_layers=2"),
        ("optimizer.warmup_steps=2", "optimizer.warmup_steps=2 must be fewer than steps=2"),
        ("steps", "is not of the form key=value"),
    ],
)
def test_a_wrong_config_is_one_line_and_exit_code_2(tmp_path: Path, change: str, says: str) -> None:
    config = tmp_path / "train.yaml"
    config.write_text(TRAIN.format(folder=tmp_path))
    ended = tpt("train", str(config), change)
    assert ended.returncode == 2
    assert says in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_layout_that_needs_more_ranks_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "train.yaml"
    config.write_text(TRAIN.format(folder=tmp_path))
    ended = tpt("train", str(config), "parallel.tensor_parallel=2")
    assert ended.returncode == 2
    assert "does not divide the 1 rank(s) of this job" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_missing_dataset_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    config = tmp_path / "train.yaml"
    config.write_text(TRAIN.format(folder=tmp_path))
    ended = tpt("train", str(config))
    assert ended.returncode == 1
    assert "nothing.idx: no such file" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_torch_that_does_not_import_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')\n")
    config = tmp_path / "train.yaml"
    config.write_text(TRAIN.format(folder=tmp_path))
    for command in ("train", "plan"):
        ended = tpt(command, str(config), *(["--world-size", "1", "model.vocab_size=9"] if command == "plan" else []), PYTHONPATH=f"{tmp_path}:{ROOT}")
        assert ended.returncode == 1
        says = "tpt: torch is installed but does not import: libcudart.so.13: cannot open shared object file; `tpt doctor` says what is missing\n"
        assert ended.stderr == says


def test_inspect_does_not_take_nothing_for_this_folder() -> None:
    ended = tpt("inspect", "")
    assert ended.returncode == 2
    assert "PATH is empty" in ended.stderr


def test_a_config_that_is_not_there_names_the_recipes() -> None:
    ended = tpt("augment", "no-such-thing")
    assert ended.returncode == 2
    assert "demo-augment" in ended.stderr


def test_help_answers_at_once() -> None:
    """A bound, not a timing: what --help imports."""
    code = "import sys; sys.argv = ['tpt', '--help']\nimport tpt_megatron.cli as cli\ntry: cli.main()\nexcept SystemExit: pass\n"
    code += "heavy = {'torch', 'transformers', 'numpy', 'pyarrow', 'pydantic', 'tokenizers'} & set(sys.modules); sys.exit(', '.join(heavy) or 0)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
