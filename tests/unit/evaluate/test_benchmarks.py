"""Benchmarks from the config to the result, asked of models whose every word is known; and what is refused."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("lm_eval")

sys.path.insert(0, str(Path(__file__).parents[1] / "convert"))
from torch_dist import checkpoint_state, random_llama, tiny_model, write_checkpoint

from tests.support.chain_models import EOD, chain_model
from tpt_megatron.config.evaluate import EvaluateConfig
from tpt_megatron.config.load import check_config
from tpt_megatron.errors import ConfigError, DataError, MachineError, Stopped
from tpt_megatron.evaluate.benchmarks.asking import fit, sampling_of
from tpt_megatron.evaluate.benchmarks.harness import prepare
from tpt_megatron.evaluate.generate import Generator, Request
from tpt_megatron.evaluate.runner import run_evaluate, scores_line
from tpt_megatron.evaluate.subjects import thoughts_of

THINKS = ["\nAnswer:", "<think>", "\nQuestion:", " The answer is 7.", "</think>", " The answer is 18.", "\nQuestion:"]
"""Thinks of a stop text and of another answer, answers, and is stopped."""


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    """GSM8K as it comes, of which every other answer is 18."""
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps({"question": f"What is {i}?", "answer": f"Well.\n#### {18 if i % 2 else i}"}) + "\n" for i in range(6)))
    return path


def config_of(model: Path, problems: Path, benchmark: dict[str, Any] | None = None, **changes: Any) -> EvaluateConfig:
    asked = {"name": "gsm8k", "data": problems, "num_shots": 0, "max_new_tokens": 20, **(benchmark or {})}
    return EvaluateConfig.model_validate({"model": model, "benchmarks": [asked], "batch_size": 4, **changes})


def config_of_run(run: Path, data: Path, **changes: Any) -> EvaluateConfig:
    return EvaluateConfig.model_validate({**config_of(run, data).model_dump(), "model": None, "run_dir": run, **changes})


def only(results: list[dict[str, Any]]) -> dict[str, Any]:
    (result,) = results
    found: dict[str, Any] = result["tasks"]["gsm8k"]
    return found


def samples(model: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (model / "evaluation" / f"{model.name}.samples.jsonl").read_text().splitlines()]


def test_a_model_that_thinks_is_stopped_after_its_thought(tmp_path: Path, problems: Path) -> None:
    model = chain_model(tmp_path / "model", THINKS)
    (result,) = run_evaluate(config_of(model, problems))
    found = result["tasks"]["gsm8k"]
    assert (found["accuracy"], found["correct"], found["problems"]) == (0.5, 3, 6)
    assert (found["failed_extractions"], found["reached_limit"], found["open_thoughts"], found["cut_prompts"]) == (0, 0, 0, 0)
    assert found["metrics"] == {"gsm8k/accuracy,none": 0.5, "gsm8k/failed_extraction,none": 0.0}
    assert found["mean_new_tokens"] == 6
    assert json.loads((model / "evaluation" / "model.json").read_text()) == result
    assert scores_line(result) == "gsm8k 0.500"
    assert samples(model)[1] == {
        "id": "2",
        "task": "gsm8k",
        "prompt": "Question: What is 1?\nAnswer:",
        "continuation": "<think>\nQuestion: The answer is 7.</think> The answer is 18.",
        "extracted": "18",
        "answer": "18",
        "correct": True,
        "new_tokens": 6,
    }


def test_other_delimiters_are_no_thoughts(tmp_path: Path, problems: Path) -> None:
    model = chain_model(tmp_path / "model", THINKS)
    found = only(run_evaluate(config_of(model, problems, benchmark_options={"thoughts": {"open": "[", "close": "]"}})))
    assert (found["failed_extractions"], found["correct"], found["mean_new_tokens"]) == (6, 0, 2)
    assert {sample["continuation"] for sample in samples(model)} == {"<think>"}


@pytest.mark.parametrize(("answer_from", "correct"), [("anywhere", 3), ("outside_thoughts", 0)])
def test_answers_in_thoughts_count_where_they_may(tmp_path: Path, problems: Path, answer_from: str, correct: int) -> None:
    model = chain_model(tmp_path / "model", ["\nAnswer:", "<think>", " The answer is 18.", "</think>", " Done.", "\nQuestion:"])
    found = only(run_evaluate(config_of(model, problems, benchmark_options={"answer_from": answer_from})))
    assert (found["correct"], found["failed_extractions"]) == (correct, 0 if correct else 6)
    assert samples(model)[0]["continuation"] == "<think> The answer is 18.</think> Done."


def test_a_thought_without_an_end_is_counted(tmp_path: Path, problems: Path) -> None:
    model = chain_model(tmp_path / "model", ["\nAnswer:", "<think>", "\nQuestion:", " or", "\nQuestion:"])
    (result,) = run_evaluate(config_of(model, problems, benchmark={"max_new_tokens": 9}))
    found = result["tasks"]["gsm8k"]
    assert (found["accuracy"], found["failed_extractions"], found["reached_limit"], found["open_thoughts"], found["mean_new_tokens"]) == (0, 6, 6, 6, 9)
    assert scores_line(result) == "gsm8k 0.000 (100% without an answer)"


def test_the_end_of_the_document_ends_a_thought_too(tmp_path: Path, problems: Path) -> None:
    model = chain_model(tmp_path / "model", ["\nAnswer:", "<think>", " The answer is 18."])
    found = only(run_evaluate(config_of(model, problems)))
    assert (found["correct"], found["reached_limit"], found["open_thoughts"], found["mean_new_tokens"]) == (3, 0, 6, 2)


def test_what_the_folder_says_of_decoding_changes_nothing(tmp_path: Path, problems: Path) -> None:
    words = ["a", "b", "a"]
    for name, asked in (("plain", {}), ("other", {"no_repeat_ngram_size": 2, "min_new_tokens": 12, "do_sample": True, "top_k": 1})):
        generator = Generator(chain_model(tmp_path / name, words, **asked), "float32")
        (found,) = generator.continue_batch([Request(tuple(generator.encode("a")), 6)])
        assert (found.text, found.ended) == ("bababa", "length"), name


def test_rows_of_a_batch_end_each_by_itself(tmp_path: Path) -> None:
    generator = Generator(chain_model(tmp_path / "model", ["x", "a", "\N{CJK UNIFIED IDEOGRAPH-65E5}", "\nQ", "c", "d", "e", "f", "g"]), "float32")
    requests = [
        Request(tuple(generator.encode("x")), 20, ("\nQ",)),
        Request(tuple(generator.encode("it is x")), 3),
        Request(tuple(generator.encode("g")), 20, ("\nQ",)),
        Request(tuple(generator.encode("x")), 20, ("never", "d")),
        Request(tuple(generator.encode("x")), 20),
    ]
    found = generator.continue_batch(requests)
    assert [(one.text, one.new_tokens, one.ended) for one in found] == [
        ("a\N{CJK UNIFIED IDEOGRAPH-65E5}", 3, "stop"),
        ("a\N{CJK UNIFIED IDEOGRAPH-65E5}\nQ", 3, "length"),
        ("", 0, "end"),
        ("a\N{CJK UNIFIED IDEOGRAPH-65E5}\nQc", 5, "stop"),
        ("a\N{CJK UNIFIED IDEOGRAPH-65E5}\nQcdefg", 8, "end"),
    ]


def test_a_stop_text_in_parts_of_characters_is_seen(tmp_path: Path) -> None:
    """A character of two tokens, as byte-level BPE has it for many, is no text before the second. Ã and © stand for its bytes."""
    generator = Generator(chain_model(tmp_path / "model", ["x", "Ã", "©", "y", "z"]), "float32")
    (found,) = generator.continue_batch([Request(tuple(generator.encode("x")), 9)])
    assert (found.text, found.new_tokens) == ("éyz", 4)
    (found,) = generator.continue_batch([Request(tuple(generator.encode("x")), 9, ("éy",))])
    assert (found.text, found.new_tokens, found.ended) == ("", 3, "stop")


def journal_of(model: Path) -> Path:
    return model / "evaluation" / "journal" / model.name / "gsm8k.jsonl"


def test_what_was_answered_is_not_asked_again(tmp_path: Path, problems: Path) -> None:
    model = chain_model(tmp_path / "model", THINKS)
    (first,) = run_evaluate(config_of(model, problems))
    content = journal_of(model).read_bytes()
    assert content.count(b"\n") == 2, "a batch of four, and one of two"
    result_path, samples_path = (model / "evaluation" / f"model.{ending}" for ending in ("json", "samples.jsonl"))
    results, asked = result_path.read_bytes(), samples_path.read_bytes()
    result_path.unlink()
    journal_of(model).write_bytes(content[: content.index(b"\n") + 30])  # killed while it wrote the second
    assert run_evaluate(config_of(model, problems)) == [first]
    assert journal_of(model).read_bytes() == content
    assert (result_path.read_bytes(), samples_path.read_bytes()) == (results, asked)

    # Answers that nobody gave show which were taken.
    told = content.replace(b"The answer is 18.", b"The answer is 17.")
    journal_of(model).write_bytes(told)
    for same in ({"batch_size": 1}, {"benchmark_options": {"answer_from": "outside_thoughts"}}, {"limit": 5}, {"benchmark_options": {"device": "cpu"}}):
        result_path.unlink(missing_ok=True)
        assert only(run_evaluate(config_of(model, problems, **same)))["correct"] == 0, same
    assert journal_of(model).read_bytes() == told
    others: list[dict[str, Any]] = [
        {"benchmark_options": {"thoughts": {"open": "<think>", "close": "</think>\n"}}},
        {"benchmark_options": {"seed": 1}},
        {"dtype": "bfloat16"},
        {"benchmark": {"max_new_tokens": 19}},
    ]
    for number, other in enumerate(others, 1):
        run_evaluate(config_of(model, problems, **other))
        assert journal_of(model).read_bytes().count(b"\n") == 2 + 2 * number, other


def test_other_weights_are_asked_anew(tmp_path: Path, problems: Path) -> None:
    model = chain_model(tmp_path / "model", THINKS)
    assert only(run_evaluate(config_of(model, problems)))["correct"] == 3
    weights = load_file(model / "model.safetensors")
    save_file({**weights, "lm_head.weight": torch.zeros_like(weights["lm_head.weight"])}, model / "model.safetensors", metadata={"format": "pt"})
    assert only(run_evaluate(config_of(model, problems)))["mean_new_tokens"] == 0


def test_every_checkpoint_of_a_run_beside_tasks_of_ones_own(tmp_path: Path, problems: Path) -> None:
    words = tuple(f"w{i}" for i in range(59))
    shape = tiny_model(hidden_size=64, num_layers=1, head_dim=None)
    for step in (50, 100):
        state = checkpoint_state(random_llama(shape, seed=step), shape, padded_vocab=128)
        write_checkpoint(tmp_path / "run", shape, state, step=step, words=words)
    own = tmp_path / "own.jsonl"
    own.write_text(json.dumps({"problem": "w1 w2", "answer": "w3"}) + "\n")
    asked = {"problems": own, "tasks": {"direct": {"prompt": "{problem}", "answer_pattern": "(w\\d)", "max_new_tokens": 3}}}
    (tmp_path / "run/evaluation/.model.killed/hf").mkdir(parents=True)
    results = run_evaluate(config_of_run(tmp_path / "run", problems, **asked))
    assert [(result["step"], list(result["tasks"]), result["problems"]) for result in results] == [(step, ["direct", "gsm8k"], 1) for step in (50, 100)]
    names = {f"iter_{step}{end}" for step in ("0000050", "0000100") for end in (".json", ".samples.jsonl")}
    assert {path.name for path in (tmp_path / "run/evaluation").iterdir()} == {*names, "journal"}
    assert len({(tmp_path / f"run/evaluation/journal/iter_{step}/gsm8k.jsonl").read_bytes() for step in ("0000050", "0000100")}) == 2
    lines = (tmp_path / "run/evaluation/iter_0000100.samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["task"] for line in lines] == ["direct"] + ["gsm8k"] * 6


def test_a_task_of_lm_eval_reads_local_files(tmp_path: Path) -> None:
    """Ranked choices, by lm-eval's own task: the model says yes, whatever it is asked."""
    model = chain_model(tmp_path / "model", ["Answer:", " yes"])
    data = tmp_path / "val.jsonl"
    data.write_text("".join(json.dumps({"passage": "p", "question": "q", "label": label}) + "\n" for label in (1, 1, 0)))
    asked = {"name": "super_glue-boolq-t5-prompt", "data": data, "max_new_tokens": 3}
    ranked = {"name": "piqa", "data": tmp_path / "piqa.jsonl", "num_shots": 0}
    ranked["data"].write_text(json.dumps({"goal": "g", "sol1": " yes", "sol2": "no, no, no", "label": 0}) + "\n")
    config = EvaluateConfig.model_validate({"model": model, "benchmarks": [asked, ranked], "batch_size": 2})
    (result,) = run_evaluate(config)
    assert result["tasks"]["piqa"]["metrics"]["piqa/acc,none"] == 1.0
    assert (result["tasks"]["piqa"]["accuracy"], result["tasks"]["piqa"]["problems"], result["tasks"]["piqa"]["mean_new_tokens"]) == (1.0, 1, None)
    assert result["tasks"]["super_glue-boolq-t5-prompt"]["accuracy"] == 0.0
    (model / "evaluation/model.json").unlink()
    journals = model / "evaluation/journal/model"
    before = {path.name: path.read_bytes() for path in journals.iterdir()}
    assert run_evaluate(config) == [result]
    assert {path.name: path.read_bytes() for path in journals.iterdir()} == before
    assert {record["task"] for record in samples(model)} == {"piqa", "super_glue-boolq-t5-prompt"}


def test_other_examples_are_another_result(tmp_path: Path) -> None:
    def settings(example: str) -> Any:
        for name, goal in (("val", "g"), ("train", example)):
            (tmp_path / f"{name}.jsonl").write_text(json.dumps({"goal": goal, "sol1": "a", "sol2": "b", "label": 0}) + "\n")
        asked = {"name": "piqa", "data": tmp_path / "val.jsonl", "shots": tmp_path / "train.jsonl", "num_shots": 1}
        return prepare(EvaluateConfig.model_validate({"model": tmp_path, "benchmarks": [asked]}))[0].settings

    assert settings("one") == settings("one") != settings("other")


def test_a_prompt_without_room_loses_its_beginning() -> None:
    ids = list(range(90))
    assert fit(ids, 20, None) == (ids, 20)
    assert fit(ids, 20, 200) == (ids, 20)
    assert fit(ids, 20, 100) == (ids[-80:], 20)
    assert fit(ids[:85], 20, 100) == (ids[5:85], 20)
    assert fit(ids, 2000, 100) == (ids[-75:], 25)
    assert fit(ids[:70], 2000, 100) == (ids[:70], 30)
    assert fit(ids, 20, 100, begins=1) == ([0, *ids[-79:]], 20)
    assert fit(ids[:80], 20, 100, begins=1) == (ids[:80], 20)


def test_prompts_without_room_are_counted(tmp_path: Path, problems: Path) -> None:
    model = chain_model(tmp_path / "model", THINKS, positions=20)
    found = only(run_evaluate(config_of(model, problems)))
    assert found["cut_prompts"] == 6


@pytest.mark.parametrize(
    ("asked", "sampling"),
    [
        ({"until": ["x"], "max_gen_toks": 5, "do_sample": False, "temperature": 0.0, "top_p": 0.9}, {}),
        ({"temperature": 0.5, "top_p": 0.9}, {"do_sample": True, "temperature": 0.5, "top_p": 0.9}),
        ({"do_sample": True, "temperature": 0.0}, {}),
        ({"do_sample": False, "temperature": 0.7}, {}),
    ],
)
def test_decoding_is_greedy_unless_a_task_draws(asked: dict[str, Any], sampling: dict[str, Any]) -> None:
    assert sampling_of(asked) == sampling


def refused(tmp_path: Path, values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as error:
        check_config(EvaluateConfig, {"model": tmp_path, **values}, "e.yaml")
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({}, "nothing is asked: give tasks, with problems, or benchmarks"),
        ({"benchmarks": [{"name": "gsm8k"}]}, "benchmarks.0: key 'data' is missing: gsm8k is read from local files"),
        ({"benchmarks": [{"name": "gsm8k", "data": "d", "sots": "s"}]}, "unknown key 'benchmarks.0.sots'; allowed here: data, limit, max_new_tokens"),
        ({"benchmarks": [{"name": "boolq", "data": "d", "shots": "s"}]}, "boolq is asked without examples"),
        ({"benchmarks": [{"name": "arc_easy", "shots": "s"}]}, "shots=s needs data"),
        ({"benchmarks": [{"name": "math", "data": "d"}, {"name": "math", "data": "e"}]}, "benchmarks: 'math' is named twice"),
        ({"benchmarks": [{"name": "math", "data": "d"}], "benchmark_options": {"backend": "vlm"}}, "benchmark_options.backend='vlm'"),
        ({"benchmarks": [{"name": "math", "data": "d"}], "benchmark_options": {"device": "gpu"}}, "device='gpu' must be cpu, cuda, or cuda: and a number"),
        ({"benchmarks": [{"name": "math", "data": "d"}], "benchmark_options": {"backend": "vllm", "device": "cpu"}}, "device=cpu is for backend=transformers"),
        ({"benchmarks": [{"name": "math", "data": "d"}], "problems": "p"}, "problems=p are asked by no task"),
        ({"tasks": {"t": {"prompt": "p", "answer_pattern": "(a)"}}}, "key 'problems' is missing: tasks ask them"),
        ({"problems": "p", "tasks": {"t": {"prompt": "p", "answer_pattern": "(a)"}}, "benchmark_options": {"seed": 4}}, "have no effect without benchmarks"),
    ],
)
def test_a_config_that_cannot_be_is_refused_by_its_key(tmp_path: Path, values: dict[str, Any], says: str) -> None:
    assert says in refused(tmp_path, values)


def test_what_does_not_fit_is_refused_before_any_model_is_loaded(tmp_path: Path, problems: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"never read")

    def refusal(kind: type[Exception], benchmark: dict[str, Any], **changes: Any) -> str:
        with pytest.raises(kind) as error:
            run_evaluate(EvaluateConfig.model_validate({"model": model, "benchmarks": [benchmark], **changes}))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "name='hellaswagg' is none of this package's" in refusal(ConfigError, {"name": "hellaswagg"})
    assert "do you mean hellaswag" in refusal(ConfigError, {"name": "hellaswagg"})
    assert "lm-eval reads the data of this one by itself" in refusal(ConfigError, {"name": "ai2_arc", "data": problems})
    assert "key 'shots' is missing, for its 3 examples" in refusal(ConfigError, {"name": "piqa", "data": problems, "num_shots": 3})
    assert "piqa of lm-eval cannot use these records" in refusal(DataError, {"name": "piqa", "data": problems, "num_shots": 0})
    assert "humaneval runs code that a model writes" in refusal(ConfigError, {"name": "humaneval"})
    assert "no input file matches" in refusal(DataError, {"name": "gsm8k", "data": tmp_path / "nowhere"})
    vllm = refusal(MachineError, {"name": "gsm8k", "data": problems}, benchmark_options={"backend": "vllm"})
    assert "vllm is not installed; this evaluation needs it: pip install 'tpt-megatron[vllm]'" in vllm


@pytest.mark.parametrize("package", ["lm_eval", "math_verify"])
def test_what_is_not_installed_is_told_with_the_command(tmp_path: Path, problems: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(MachineError, match=rf"{package} is not installed; .* pip install 'tpt-megatron\[benchmarks\]'"):
        run_evaluate(config_of(tmp_path, problems, benchmark={"name": "math"}))


def test_a_gpu_that_is_not_there_is_refused(tmp_path: Path, problems: Path) -> None:
    model = chain_model(tmp_path / "model", THINKS)
    with pytest.raises(MachineError, match="device=cuda:99: this machine has no such GPU"):
        run_evaluate(config_of(model, problems, benchmark_options={"device": "cuda:99"}))


def test_a_tokenizer_without_bos_cannot_add_one(tmp_path: Path, problems: Path) -> None:
    model = chain_model(tmp_path / "model", THINKS)
    with pytest.raises(ConfigError, match="add_bos_token=true: the model's tokenizer has no BOS token"):
        run_evaluate(config_of(model, problems, benchmark_options={"add_bos_token": True}))


def test_a_bos_stands_first_where_it_is_asked_for(tmp_path: Path, problems: Path) -> None:
    """The prompt is cut to a quarter of its room without it, and to the same number with it."""
    model = chain_model(tmp_path / "model", THINKS)
    about = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**about, "bos_token": EOD}))
    from tpt_megatron.config.evaluate import BenchmarkOptions
    from tpt_megatron.evaluate.benchmarks.backends import TransformersBackend

    generator = Generator(model, "float32")
    plain, first = (TransformersBackend(generator, BenchmarkOptions(add_bos_token=add), 1).encode("ab") for add in (False, True))
    assert first == [generator.tokenizer.convert_tokens_to_ids(EOD), *plain]


def dataset_manifest(path: Path, opening: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"settings": {"delimiters": {"open": opening, "close": "</t>", "between": "", "inside": ""}}}))


def test_thoughts_are_those_of_the_runs_datasets(tmp_path: Path, problems: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    config = config_of_run(run, problems)
    assert thoughts_of(config).open == "<think>", "nothing is known of the run"
    shares: Callable[..., dict[str, Any]] = lambda *names: {"config": {"data": {"train": [{"path": str(tmp_path / name)} for name in names]}}}  # noqa: E731
    dataset_manifest(tmp_path / "a.manifest.json", "<t>")
    dataset_manifest(tmp_path / "b.manifest.json", "<u>")
    (run / "run.json").write_text(json.dumps(shares("a", "none")))
    assert (thoughts_of(config).open, thoughts_of(config).close) == ("<t>", "</t>")
    (run / "run.json").write_text(json.dumps(shares("a", "b")))
    with pytest.raises(ConfigError, match=r"benchmark_options\.thoughts is missing: the run's datasets have several delimiters \(<t> and </t>, <u> and </t>\)"):
        thoughts_of(config)
    given = config_of_run(run, problems, benchmark_options={"thoughts": {"open": "(", "close": ")"}})
    assert thoughts_of(given).open == "("


def test_a_signal_that_a_library_swallows_ends_the_run_before_a_result_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """math-verify takes any exception for a formula that cannot be parsed: a signal would become a wrong answer."""
    import math_verify

    parse = math_verify.parse

    def signalled(text: str) -> Any:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            return parse(text)
        except Exception:  # noqa: BLE001  as it does itself
            return []

    monkeypatch.setattr(math_verify, "parse", signalled)
    data = tmp_path / "math.jsonl"
    data.write_text(json.dumps({"problem": "Halve 1.", "solution": "\\boxed{\\frac12}"}) + "\n")
    model = chain_model(tmp_path / "model", ["\nSolution:", " The final answer is $0.5$."])
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(Stopped):
            run_evaluate(config_of(model, data, benchmark={"name": "math"}))
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "it is as before"
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not (model / "evaluation/model.json").exists()
    monkeypatch.undo()
    (result,) = run_evaluate(config_of(model, data, benchmark={"name": "math"}))
    assert result["tasks"]["math"]["accuracy"] == 1.0
