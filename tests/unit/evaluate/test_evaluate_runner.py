from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).parents[1] / "convert"))
from torch_dist import EOD, checkpoint_state, random_llama, tiny_model, write_checkpoint  # noqa: E402

from tpt_megatron.config.evaluate import EvaluateConfig  # noqa: E402
from tpt_megatron.convert.export import export_checkpoint  # noqa: E402
from tpt_megatron.errors import CheckpointError, ConfigError, DataError, MachineError, RecordError  # noqa: E402
from tpt_megatron.evaluate.generate import Generator  # noqa: E402
from tpt_megatron.evaluate.runner import run_evaluate  # noqa: E402
from tpt_megatron.tokenizer import train_word_tokenizer  # noqa: E402

WORDS = tuple(f"w{i}" for i in range(59))
TOKENIZER = train_word_tokenizer([], WORDS, EOD)
IDS = [TOKENIZER.encode(word)[0] for word in WORDS]
MODEL = tiny_model(hidden_size=64, num_layers=1, head_dim=None)


def successor_state(stride: int) -> dict[str, Any]:
    """A model that says w5 after w(5 - stride), and ends after w9: what it should write is known."""
    llama = random_llama(MODEL)
    with torch.no_grad():
        llama.model.layers[0].self_attn.o_proj.weight.zero_()
        llama.model.layers[0].mlp.down_proj.weight.zero_()
        llama.model.norm.weight.fill_(1.0)
        llama.model.embed_tokens.weight.copy_(torch.eye(61, 64))
        llama.lm_head.weight.zero_()
        for word, token in enumerate(IDS):
            llama.lm_head.weight[TOKENIZER.eod_id if word >= 9 else IDS[word + stride], token] = 1.0
    return checkpoint_state(llama, MODEL, padded_vocab=128)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "run", MODEL, successor_state(2), step=50, words=WORDS)
    write_checkpoint(tmp_path / "run", MODEL, successor_state(1), step=100, words=WORDS)
    return tmp_path / "run"


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    path = tmp_path / "problems.jsonl"
    rows = [{"id": f"p{i}", "problem": " ".join(WORDS[20 : 20 + i]) + f" w{i}", "answer": "w9"} for i in range(1, 7)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config_of(problems: Path, **changes: Any) -> EvaluateConfig:
    tasks = {"direct": {"prompt": "{problem}", "answer_pattern": r"(w\d+)", "max_new_tokens": 12}}
    return EvaluateConfig.model_validate({"problems": problems, "tasks": tasks, "batch_size": 4, **changes})


def test_every_checkpoint_is_scored_and_nothing_else_left(run: Path, problems: Path) -> None:
    results = run_evaluate(config_of(problems, run_dir=run))
    assert [(result["step"], result["tokens_seen"], result["arm"], result["problems"]) for result in results] == [
        (50, 50_000, "vanilla", 6),
        (100, 100_000, "vanilla", 6),
    ]
    # Stride 2 meets w9 from odd starts alone; from even ones it passes over to w10. Both then end.
    assert results[0]["tasks"]["direct"] == {"accuracy": 0.5, "correct": 3, "failed_extractions": 0, "mean_new_tokens": 3.0}
    assert results[1]["tasks"]["direct"] == {"accuracy": 1.0, "correct": 6, "failed_extractions": 0, "mean_new_tokens": 5.5}
    names = {f"iter_{step}{end}" for step in ("0000050", "0000100") for end in (".json", ".samples.jsonl")}
    assert {path.name for path in (run / "evaluation").iterdir()} == names
    assert json.loads((run / "evaluation" / "iter_0000050.json").read_text()) == results[0]
    samples = [json.loads(line) for line in (run / "evaluation" / "iter_0000100.samples.jsonl").read_text().splitlines()]
    assert samples[3] == {
        "id": "p4",
        "task": "direct",
        "prompt": "w20 w21 w22 w23 w4",
        "continuation": samples[3]["continuation"],
        "extracted": "w9",
        "answer": "w9",
        "correct": True,
        "new_tokens": 5,
    }
    assert samples[3]["continuation"].split() == ["w5", "w6", "w7", "w8", "w9"]


def test_rerun_takes_what_is_there_and_redoes_what_changed(run: Path, problems: Path) -> None:
    run_evaluate(config_of(problems, run_dir=run))
    first, second = (run / "evaluation" / f"iter_{step}.json" for step in ("0000050", "0000100"))
    times = first.stat().st_mtime_ns, second.stat().st_mtime_ns
    second.unlink()
    run_evaluate(config_of(problems, run_dir=run, batch_size=2))
    assert first.stat().st_mtime_ns == times[0], "same settings: taken as it is"
    assert second.is_file()
    assert [result["problems"] for result in run_evaluate(config_of(problems, run_dir=run, limit=2))] == [2, 2]
    assert first.stat().st_mtime_ns != times[0]


def test_new_weights_of_the_same_step_are_scored_again(run: Path, problems: Path, tmp_path: Path) -> None:
    before = run_evaluate(config_of(problems, run_dir=run))
    other = write_checkpoint(tmp_path / "other", MODEL, successor_state(2), step=100, words=WORDS)
    (run / "checkpoints" / "iter_0000100").rename(tmp_path / "old")
    other.rename(run / "checkpoints" / "iter_0000100")
    after = run_evaluate(config_of(problems, run_dir=run))
    assert (before[1]["tasks"]["direct"]["accuracy"], after[1]["tasks"]["direct"]["accuracy"]) == (1.0, 0.5)


def test_exported_model_scores_as_its_checkpoint(run: Path, problems: Path, tmp_path: Path) -> None:
    export_checkpoint(run, tmp_path / "hf")
    (result,) = run_evaluate(config_of(problems, model=tmp_path / "hf"))
    assert result["tasks"]["direct"]["correct"] == 6
    assert (result["step"], result["model"]) == (None, str(tmp_path / "hf"))
    assert (tmp_path / "hf" / "evaluation" / "hf.json").is_file()


def test_padded_batches_continue_as_single_prompts_do(tmp_path: Path) -> None:
    llama = random_llama(MODEL, seed=5)
    write_checkpoint(tmp_path / "run", MODEL, checkpoint_state(llama, MODEL, padded_vocab=128), words=WORDS)
    export_checkpoint(tmp_path / "run", tmp_path / "hf")
    prompts = [" ".join(WORDS[i : i + length]) for i, length in enumerate((9, 1, 4, 14, 2))]
    continuations = Generator(tmp_path / "hf", "float32").continue_all(prompts, max_new_tokens=8, batch_size=5)
    for prompt, continuation in zip(prompts, continuations, strict=True):
        ids, expected = TOKENIZER.encode(prompt), list[int]()
        while len(expected) < 8 and TOKENIZER.eod_id not in expected:
            with torch.inference_mode():
                expected.append(int(llama(torch.tensor([ids + expected])).logits[0, -1].argmax()))
        expected = [token for token in expected if token != TOKENIZER.eod_id]
        assert continuation.text == TOKENIZER.decode(expected)
        assert continuation.new_tokens == len(expected)


def test_transformers_stays_silent(run: Path, problems: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_evaluate(config_of(problems, run_dir=run))
    assert capfd.readouterr() == ("", "")


def test_mistakes_are_one_line(run: Path, problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no finished checkpoint"):
        run_evaluate(config_of(problems, run_dir=tmp_path / "empty"))
    with pytest.raises(DataError, match="not a Hugging Face model folder"):
        run_evaluate(config_of(problems, model=tmp_path / "empty"))
    with pytest.raises(RecordError, match=r"problems\.jsonl:1: no field 'question'"):
        run_evaluate(config_of(problems, run_dir=run, tasks={"t": {"prompt": "{question}", "answer_pattern": "(x)"}}))
    export_checkpoint(run, tmp_path / "hf")
    weights = tmp_path / "hf" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(DataError, match="cannot be loaded") as error:
        run_evaluate(config_of(problems, model=tmp_path / "hf"))
    assert "\n" not in str(error.value)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MachineError, match=r"tpt-megatron\[evaluate\]"):
        run_evaluate(config_of(problems, run_dir=run))


def test_a_second_process_in_an_output_is_refused(run: Path, problems: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    held = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(ConfigError, match="another tpt evaluate is at work there"):
        run_evaluate(config_of(problems, run_dir=run, output=tmp_path / "out"))
    os.close(held)
    assert len(run_evaluate(config_of(problems, run_dir=run, output=tmp_path / "out"))) == 2


def test_missing_weights_are_not_made_up(run: Path, problems: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    export_checkpoint(run, tmp_path / "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"lack lm_head\.weight"):
        run_evaluate(config_of(problems, model=tmp_path / "hf"))
