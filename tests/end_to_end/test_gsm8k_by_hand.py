"""The stages by hand on real input, as docs/by-hand.md walks through them: GSM8K, TP=2 and PP=2, export, generate."""

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k" / "train.jsonl"
EXAMPLES = ROOT / "examples" / "gsm8k"
DOCUMENTS = 7473


def run(*command: str, **environment: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    ended = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return ended.stdout


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with GSM8K augmented and preprocessed."""
    if not GSM8K.is_file():
        assert not os.environ.get("CI"), f"{GSM8K} is missing: CI must run this test"
        pytest.skip(f"needs GSM8K's train.jsonl at {GSM8K}")
    work = tmp_path_factory.mktemp("gsm8k")
    run("-m", "tpt_megatron.cli", "augment", str(EXAMPLES / "1-augment.yaml"), f"input={GSM8K}", f"output={work / 'augmented'}")
    run("-m", "tpt_megatron.cli", "preprocess", str(EXAMPLES / "2-preprocess.yaml"), f"input={work / 'augmented'}", f"output={work / 'datasets'}")
    return work


def manifest(work: Path, arm: str, split: str) -> dict[str, int]:
    counts: dict[str, int] = json.loads((work / "datasets" / arm / f"{split}.manifest.json").read_text())["counts"]
    return counts


def test_every_document_is_in_both_arms(work: Path) -> None:
    for arm in ("vanilla", "append"):
        assert sum(manifest(work, arm, split)["documents"] for split in ("train", "validation")) == DOCUMENTS
    for split in ("train", "validation"):
        vanilla, append = manifest(work, "vanilla", split), manifest(work, "append", split)
        assert append["tokens_document"] == vanilla["tokens"]
        assert append["tokens_thinking"] > vanilla["tokens"] / 2


@pytest.fixture(scope="module")
def train(work: Path) -> Callable[[str], tuple[Path, Path]]:
    """Trains on two ranks and exports, once for each axis; returns the run and the model folder."""

    @cache
    def trained(axis: str) -> tuple[Path, Path]:
        run_dir, model_dir = work / f"run-{axis}", work / f"model-{axis}"
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--module", "tpt_megatron.cli")
        data = work / "datasets" / "append"
        paths = (f"run_dir={run_dir}", f"data.train={data / 'train'}", f"data.validation={data / 'validation'}")
        run(*launcher, "train", str(EXAMPLES / "3-train.yaml"), *paths, f"parallel.{axis}=2")
        run("-m", "tpt_megatron.cli", "convert", "export", str(run_dir), str(model_dir))
        return run_dir, model_dir

    return trained


@pytest.mark.parametrize("axis", ["tensor_parallel", "pipeline_parallel"])
def test_training_exports_a_model_that_transformers_runs(train: Callable[[str], tuple[Path, Path]], axis: str) -> None:
    run_dir, model_dir = train(axis)
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode), "a rank wrote over the null device"
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == list(range(1, 21))
    assert metrics[-1]["tokens_seen"] == 20 * 8 * 256
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 1.0
    assert metrics[-1]["validation_loss"] == pytest.approx(metrics[-1]["loss"], abs=0.5)
    assert {"gradient_norm", "learning_rate", "tokens_per_second", "step_time_s", "loss_document", "loss_thinking"} <= metrics[-1].keys()
    described = json.loads((run_dir / "run.json").read_text())
    assert described["arm"] == "append"
    assert described["config"]["parallel"][axis] == 2
    assert described["sessions"][0]["versions"]["megatron-core"] == "0.16.1"

    generate = (
        "import sys, torch; from transformers import AutoModelForCausalLM, AutoTokenizer; folder = sys.argv[1]\n"
        "model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)\n"
        "inputs = tokenizer('Natalia sold 48 clips', return_tensors='pt')\n"
        "with torch.no_grad(): loss = model(**inputs, labels=inputs['input_ids']).loss.item()\n"
        "out = model.generate(**inputs, max_new_tokens=16, do_sample=False)\n"
        "print(inputs['input_ids'].shape[1], out.shape[1], loss)\n"
    )
    prompt_tokens, total_tokens, loss = run("-c", generate, str(model_dir)).split()
    assert int(prompt_tokens) == len("Natalia sold 48 clips")
    assert int(total_tokens) > int(prompt_tokens)
    # An export that scrambled the weights would be near or above the uniform ln(257) = 5.5.
    assert float(loss) < 4.5


COMPARE = """
import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, text = sys.argv[1:]
mx.set_default_device(mx.cpu)
ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]
transformers = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
other, _ = load_model(Path(folder))
with torch.no_grad():
    expected = transformers(ids).logits[0].numpy()
found = np.array(other(mx.array(ids.tolist()))[0].astype(mx.float32))
continued = transformers.generate(ids, max_new_tokens=20, min_new_tokens=20, do_sample=False)[0, ids.size(1) :].tolist()
print(json.dumps({
    "difference": float(abs(found - expected).max()),
    "greedy": [row.argmax(-1).tolist() for row in (found, expected)],
    "continued": [[int(token) for token, _ in generate_step(mx.array(ids[0].tolist()), other, max_tokens=20)], continued],
}))
"""

LM_EVAL_TASK = """
task: gsm8k_sentences
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: bits_per_byte}]
"""


def test_another_engine_continues_a_prompt_alike(train: Callable[[str], tuple[Path, Path]]) -> None:
    if find_spec("mlx_lm") is None:  # importing it would lower this process's limit of open files
        pytest.skip("needs mlx-lm, which has wheels for Linux and macOS")
    _, model_dir = train("tensor_parallel")
    question = json.loads(GSM8K.read_text().splitlines()[0])["question"]
    found = json.loads(run("-c", COMPARE, str(model_dir), question).splitlines()[-1])
    assert found["difference"] < 1e-4
    assert found["continued"][0] == found["continued"][1]
    assert found["greedy"][0] == found["greedy"][1]
    assert len(set(found["greedy"][0])) > 3, "hardly any choice was made: agreement would say little"


def test_lm_eval_runs_on_the_export_without_a_network(train: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    _, model_dir = train("tensor_parallel")
    questions = GSM8K.read_text().splitlines()[:8]
    (tmp_path / "test.jsonl").write_text("\n".join(questions) + "\n")
    (tmp_path / "task.yaml").write_text(LM_EVAL_TASK.replace("FILE", str(tmp_path / "test.jsonl")))
    model = f"pretrained={model_dir},dtype=float32"
    where = ("--include_path", str(tmp_path), "--tasks", "gsm8k_sentences", "--device", "cpu", "--output_path", str(tmp_path / "results"))
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    run("-m", "lm_eval", "run", "--model", "hf", "--model_args", model, *where, **offline)
    (found,) = (tmp_path / "results").rglob("results_*.json")
    bits = json.loads(found.read_text())["results"]["gsm8k_sentences"]["bits_per_byte,none"]
    # The tokens are bytes here: a uniform guess costs ln(257) nats, or 8.0 bits.
    assert 2.0 < bits < 6.5
