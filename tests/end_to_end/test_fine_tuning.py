"""Fine-tuning on chats made of GSM8K, by the recipes and the commands as a user gives them: replies are learned, and nothing else is."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.support.chats import chat, write_chats, write_tokenizer
from tests.support.metrics import learned
from tpt_megatron.config.load import load_config
from tpt_megatron.config.preprocess import PreprocessConfig
from tpt_megatron.config.train import TrainConfig
from tpt_megatron.datasets import PART_ASSISTANT, open_dataset
from tpt_megatron.preprocess.runner import run_preprocess
from tpt_megatron.sequences.packing import BestFit

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "train.jsonl"
CHATS, EPOCHS, BATCH, SPAN = 240, 2.5, 16, 512
SMALL = [
    "model={num_layers: 2, hidden_size: 32, ffn_hidden_size: 80, num_heads: 4, num_query_groups: 2}",
    f"data.sequence_length={SPAN}",
    "optimizer.learning_rate=1.0e-2",
    "optimizer.warmup_steps=2",
    "checkpoint={every_steps: 5}",
    f"global_batch_sequences={BATCH}",
    "precision=fp32",
    "recompute=none",
]


def tpt(*words: str, exit_code: int = 0) -> str:
    command = [sys.executable, "-m", "tpt_megatron.cli", *words]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == exit_code, ended.stderr[-4000:]
    return ended.stdout + ended.stderr


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with chats of GSM8K as datasets, and a run over them."""
    if not GSM8K.is_file():
        assert not os.environ.get("CI"), f"{GSM8K} is missing: CI must run this test"
        pytest.skip(f"needs GSM8K's train.jsonl at {GSM8K}")
    work = tmp_path_factory.mktemp("chats")
    write_tokenizer(work / "tokenizer")
    problems = [json.loads(line) for line in GSM8K.read_text(encoding="utf-8").splitlines()[:CHATS]]
    write_chats(work / "chats.jsonl", [chat(problem["question"], problem["answer"]) for problem in problems])
    where = [f"input={work}/chats.jsonl", f"output={work}/data", f"tokenizer={work}/tokenizer"]
    said = tpt("preprocess", "sft-preprocess", *where, "chat.template=chatml", "validation_fraction=0.2", "workers=2")
    assert "tokens_assistant" in said.replace(" ", "_")
    tpt("train", "sft-train", f"run_dir={work}/run", f"data.train={work}/data/chat/train", f"epochs={EPOCHS}", *validated(work), *SMALL)
    return work


def validated(work: Path) -> list[str]:
    return [f"data.validation={work}/data/chat/validation", "validate_every_steps=5"]


def test_replies_are_learned_for_as_many_epochs_as_the_recipe_says(work: Path) -> None:
    dataset = open_dataset(work / "data/chat/train")
    sequences = BestFit(dataset.lengths, SPAN, 1234, "drop").sequences_per_epoch
    lines = metrics(work / "run")
    assert len(lines) == math.ceil(EPOCHS * sequences / BATCH) > 2
    assert lines[-1]["loss_assistant"] < lines[0]["loss_assistant"] - 1
    for line in lines:
        assert line["loss"] == pytest.approx(line["loss_assistant"], rel=1e-6)
        assert line["loss_prompt"] != line["loss"]
        assert "loss_document" not in line
    assert {"validation_loss", "validation_loss_prompt", "validation_loss_assistant"} <= lines[4].keys()
    assert lines[4]["validation_loss"] == pytest.approx(lines[4]["validation_loss_assistant"], rel=1e-6)
    described = json.loads((work / "run/run.json").read_text())
    assert (described["arm"], described["epochs"], described["config"]["steps"]) == ("chat", EPOCHS, len(lines))
    said = tpt("inspect", str(work / "run"), "--step", str(len(lines)))
    assert f"step {len(lines)}: sequences {BATCH * (len(lines) - 1):,} to" in said and " c" in said
    assert "prompt" in tpt("inspect", str(work / "data/chat/train"))
    assert "finding" not in tpt("inspect", str(work / "data"), "--verify")
    tpt("inspect", str(work / "run"), "--step", str(len(lines) + 1), exit_code=2)


def test_a_run_of_epochs_goes_on_as_if_it_had_not_been_stopped(work: Path, tmp_path: Path) -> None:
    shutil.copytree(work / "run", tmp_path / "run")
    (tmp_path / "run/checkpoints/latest_checkpointed_iteration.txt").write_text("5\n")
    train = ["train", "sft-train", f"run_dir={tmp_path}/run", f"data.train={work}/data/chat/train", *validated(work), *SMALL]
    tpt(*train, f"epochs={EPOCHS}")
    assert learned(tmp_path / "run") == learned(work / "run")
    refused = tpt(*train, "epochs=0.01", exit_code=2)
    assert "sequences: optimizer.warmup_steps=2 must be fewer than steps=1" in refused
    assert refused.strip().splitlines()[-1].startswith("tpt: epochs=0.01 of ")


def test_it_starts_from_another_runs_weights_with_another_base_of_its_positions(work: Path, tmp_path: Path) -> None:
    lines, folder = metrics(work / "run"), find_folder(work / "run")
    train = ["train", "sft-train", f"run_dir={tmp_path}/run", f"data.train={work}/data/chat/train", "epochs=0.5", *SMALL, "optimizer.warmup_steps=0"]
    tpt(*train, "model.rope_theta=160_000", f"checkpoint={{load_from: {folder}, load: weights}}")
    assert lines[-1]["loss_assistant"] - 0.2 < metrics(tmp_path / "run")[0]["loss_assistant"] < lines[0]["loss_assistant"] - 1
    refused = tpt(*train, f"run_dir={tmp_path}/all", "model.rope_theta=160_000", f"checkpoint={{load_from: {folder}, load: all}}", exit_code=1)
    assert "the checkpoint has model.rope_theta=10000.0, the config 160000.0" in refused


def test_the_export_is_asked_in_the_template_it_was_tuned_with_and_ends_where_a_turn_ends(work: Path) -> None:
    tpt("convert", "export", f"{work}/run", f"{work}/model")
    tokenizer = AutoTokenizer.from_pretrained(work / "model")
    messages = chat("How many apples?", "Three.")
    written = tokenizer.apply_chat_template(messages, tokenize=False)
    assert written == "<|im_start|>user\nHow many apples?<|im_end|>\n<|im_start|>assistant\nThree.<|im_end|>\n"
    assert tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True).endswith("<|im_start|>assistant\n")
    ends = json.loads((work / "model/generation_config.json").read_text())["eos_token_id"]
    assert tokenizer.convert_ids_to_tokens(ends) == ["<|im_end|>", "<|endoftext|>"]


def find_folder(run: Path) -> Path:
    return max((run / "checkpoints").glob("iter_*"))


def test_what_the_prompt_says_after_a_reply_changes_nothing_that_is_learned(tmp_path: Path) -> None:
    """Nothing the assistant says sees it, so that only its own loss could bring it into a gradient."""
    runs = {}
    for name, weights in (("q", ""), ("z", ""), ("z", "{prompt: 1}")):
        folder = tmp_path / f"{name}{bool(weights)}"
        write_tokenizer(folder)
        chats = [[*chat(f"question {i}", f"answer {i}"), {"role": "user", "content": f"{name} {name} {name}"}] for i in range(12)]
        write_chats(folder / "in.jsonl", chats)
        values = {"input": str(folder / "in.jsonl"), "output": folder / "out", "tokenizer": str(folder), "arms": ["chat"], "chat": {"template": "chatml"}}
        run_preprocess(PreprocessConfig.model_validate(values))
        changes = [f"data.loss_weights={weights}"] if weights else []
        tpt("train", "sft-train", f"run_dir={folder}/run", f"data.train={folder}/out/chat/train", "epochs=12", *SMALL, "global_batch_sequences=2", *changes)
        runs[folder.name] = metrics(folder / "run")
    one, other, weighed = ([(line["loss"], line["gradient_norm"], line["loss_assistant"]) for line in run] for run in runs.values())
    assert len(one) > 3 and one == other
    assert [line["loss_prompt"] for line in runs["qFalse"]] != [line["loss_prompt"] for line in runs["zFalse"]]
    assert weighed[0] != other[0]


def test_a_step_of_prompt_alone_has_loss_0_and_is_no_fault(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    write_chats(tmp_path / "in.jsonl", [chat("what is it? " * 40, "a reply " * 20)])
    values = {"input": str(tmp_path / "in.jsonl"), "output": tmp_path / "out", "tokenizer": str(tmp_path), "arms": ["chat"], "chat": {"template": "chatml"}}
    run_preprocess(PreprocessConfig.model_validate(values))
    dataset = open_dataset(tmp_path / "out/chat/train")
    assert dataset.parts is not None and (dataset.parts[:64] != PART_ASSISTANT).all()
    train = ["train", "sft-train", f"run_dir={tmp_path}/run", f"data.train={tmp_path}/out/chat/train", "epochs=1", *SMALL]
    train += [
        "data.sequence_length=16",
        "data.packing=concatenate",
        "data.too_long=cut",
        "global_batch_sequences=2",
        "checkpoint={}",
        "optimizer.warmup_steps=0",
    ]
    tpt(*train)
    lines = metrics(tmp_path / "run")
    assert not any("skipped" in line for line in lines)
    without = [line for line in lines if "loss_assistant" not in line]
    assert without and all((line["loss"], line["gradient_norm"]) == (0, 0) for line in without)
    assert all(line["loss"] > 0 for line in lines if "loss_assistant" in line) and len(without) < len(lines)
    refused = tpt(*train, "data.loss_weights={assistant: 0}", exit_code=2)
    assert "data.loss_weights: prompt and assistant weigh 0, and " in refused


def test_the_recipe_has_the_papers_settings() -> None:
    config = load_config(TrainConfig, "sft-train", ["run_dir=r", "data.train=d", "checkpoint.load_from=c"])
    optimizer = config.optimizer
    assert config.global_batch_sequences * config.data.sequence_length == 2**20
    assert (config.epochs, config.model.rope_theta, config.data.loss_weights.prompt, config.data.loss_weights.assistant) == (5, 160_000, 0, 1)
    assert (optimizer.learning_rate, optimizer.schedule, optimizer.warmup_steps, optimizer.weight_decay) == (6e-5, "cosine", 400, 0)
    assert (optimizer.beta1, optimizer.beta2, optimizer.clip_gradient_norm) == (0.9, 0.999, 0.2)
