import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tpt_megatron.config.experiment import ExperimentConfig
from tpt_megatron.config.load import check_config, load_config
from tpt_megatron.config.preprocess import PreprocessConfig
from tpt_megatron.config.train import TrainConfig
from tpt_megatron.errors import ConfigError, DataError
from tpt_megatron.experiment.plan import ArmData, matched_tokens, plan_experiment, read_arm
from tpt_megatron.experiment.run import prepare
from tpt_megatron.preprocess.runner import run_preprocess
from tpt_megatron.train.flops import flops_per_token

DOCUMENTS, LENGTH, BATCH = 300, 16, 4
TRAIN = {
    "run_dir": "given by the experiment",
    "model": {"num_layers": 1, "hidden_size": 16, "ffn_hidden_size": 32, "num_heads": 2, "num_query_groups": 2},
    "data": {"train": "given by the experiment", "sequence_length": LENGTH},
    "optimizer": {"learning_rate": 1e-3},
    "steps": 7,
    "global_batch_sequences": BATCH,
}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of 9 bytes, each with a thought of 20, as the arms vanilla (10 tokens with the end) and append (40, delimiters among them)."""
    root = tmp_path_factory.mktemp("arms")
    lines = [{"text": f"document{i % 10}", "thoughts": [{"text": "t" * 19 + str(i % 10), "generator": "g"}]} for i in range(DOCUMENTS)]
    (root / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    delimiters = {"open": "[", "close": "]", "between": "-", "inside": ""}
    values = {"input": str(root / "in.jsonl"), "output": str(root / "data"), "tokenizer": "byte", "arms": ["vanilla", "append"], "delimiters": delimiters}
    run_preprocess(check_config(PreprocessConfig, values, "test"))
    (root / "train.yaml").write_text(yaml.safe_dump(TRAIN))
    return root


def experiment(root: Path, **changes: Any) -> ExperimentConfig:
    arms = {arm: {"train": str(root / "data" / arm / "train")} for arm in ("append", "vanilla")}
    values = {"output": str(root / "out"), "train": str(root / "train.yaml"), "arms": arms, "tokens": 1280, "checkpoints": 5, **changes}
    return check_config(ExperimentConfig, values, "test")


def test_arms_are_read_from_their_datasets(datasets: Path) -> None:
    config = experiment(datasets, generator={"parameters": 1000, "prompt_tokens": 7, "tokens_per_token": 2, "thoughts_kept": 0.5})
    vanilla, append = read_arm(config, "vanilla"), read_arm(config, "append")
    counts = {arm: json.loads((datasets / "data" / arm / "train.manifest.json").read_text())["counts"] for arm in ("vanilla", "append")}
    assert (vanilla.documents, append.documents) == (DOCUMENTS, DOCUMENTS)
    assert vanilla.epoch_tokens == (counts["vanilla"]["tokens"] - 1) // LENGTH * LENGTH
    assert append.epoch_tokens == (counts["append"]["tokens"] - 1) // LENGTH * LENGTH
    assert vanilla.generator_flops == 0
    a_document = (counts["append"]["tokens_document"] + counts["append"]["tokens_thinking"]) / DOCUMENTS
    assert append.generator_flops == pytest.approx(2 * 1000 * (a_document * 2 + 7) / 0.5)
    model = load_config(TrainConfig, config.train).model
    assert vanilla.train_flops == flops_per_token(model.model_copy(update={"vocab_size": 257}), LENGTH)
    assert read_arm(experiment(datasets), "append").generator_flops is None


def test_what_is_equal_is_equal(datasets: Path) -> None:
    # As many FLOPs to write a document's thoughts as training on about 80 tokens takes.
    flops = read_arm(experiment(datasets), "vanilla").train_flops
    config = experiment(datasets, match=["tokens", "documents", "compute"], generator={"parameters": int(flops)})
    planned = {(arm.match, arm.arm): arm for arm in plan_experiment(config)}
    assert [key for key in planned if key[0] == "tokens"] == [("tokens", "vanilla"), ("tokens", "append")]
    step = BATCH * LENGTH
    vanilla = planned["tokens", "vanilla"]
    assert (vanilla.tokens, vanilla.steps, vanilla.generator_flops) == (1280, 20, 0)
    assert planned["tokens", "append"].tokens == 1280
    documents = planned["documents", "append"]
    assert documents.documents == pytest.approx(vanilla.documents, rel=2 * step / documents.tokens)
    assert documents.tokens > 3 * vanilla.tokens
    compute = planned["compute", "append"]
    assert compute.total_flops is not None and vanilla.total_flops is not None
    assert compute.total_flops == pytest.approx(vanilla.total_flops, rel=2 * step / compute.tokens)
    assert compute.tokens < vanilla.tokens
    assert compute.tokens % step == 0


ARMS = st.builds(ArmData, st.integers(100, 10**9), st.integers(1, 10**7), st.floats(1e3, 1e12), st.floats(0, 1e15))


@given(ARMS, ARMS, st.integers(1, 10**10))
def test_equal_compute_counts_thoughts_once_however_often_they_are_read(baseline: ArmData, arm: ArmData, tokens: int) -> None:
    budget = baseline.train_flops * tokens + (baseline.generation(tokens) or 0)
    found = matched_tokens("compute", tokens, baseline, arm)
    assert found > 0
    assert arm.train_flops * found + (arm.generation(found) or 0) == pytest.approx(budget, rel=1e-6)
    assert matched_tokens("compute", tokens, baseline, baseline) == pytest.approx(tokens, abs=1e-6 * budget / baseline.train_flops)


@given(ARMS, ARMS, st.integers(1, 10**10))
def test_equal_documents(baseline: ArmData, arm: ArmData, tokens: int) -> None:
    assert arm.documents_seen(matched_tokens("documents", tokens, baseline, arm)) == pytest.approx(baseline.documents_seen(tokens))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"baseline": "raw"}, "baseline=raw is none of the arms append, vanilla"),
        ({"match": "compute"}, "give generator.parameters"),
        ({"seeds": [1, 2, 1]}, "seeds has one of 1, 2, 1 twice"),
        ({"tokens": 256}, "match=tokens: vanilla would be trained for 4 step(s), fewer than checkpoints=5"),
        ({"arms": {"a/b": {"train": "x"}, "vanilla": {"train": "y"}}}, "arms: 'a/b' cannot be a folder's name"),
        ({"override": {"optimizer.learningrate": 1}}, "unknown key 'optimizer.learningrate'"),
    ],
)
def test_what_cannot_be_compared_is_refused(datasets: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        plan_experiment(experiment(datasets, **changes))
    assert says in str(refused.value)


def test_little_data_is_not_repeated_more_often_than_it_may(datasets: Path) -> None:
    arms = {arm: {"train": str(datasets / "data" / arm / "train"), "max_epochs": 2} for arm in ("vanilla", "append")}
    epoch = read_arm(experiment(datasets), "vanilla").epoch_tokens
    plan_experiment(experiment(datasets, arms=arms, tokens=2 * epoch // 64 * 64))
    with pytest.raises(ConfigError, match=rf"vanilla would go 2\.\d\d times through .*, over its max_epochs=2; {2 * epoch:,} of its"):
        plan_experiment(experiment(datasets, arms=arms, tokens=2 * epoch + 64))


def test_a_dataset_without_a_manifest_cannot_be_matched(datasets: Path, tmp_path: Path) -> None:
    for ending in ("bin", "idx"):
        (tmp_path / f"train.{ending}").write_bytes((datasets / f"data/append/train.{ending}").read_bytes())
    arms = {"vanilla": {"train": str(datasets / "data/vanilla/train")}, "append": {"train": str(tmp_path / "train")}}
    with pytest.raises((DataError, ConfigError), match="manifest"):
        plan_experiment(experiment(datasets, arms=arms))


def test_every_run_has_a_config_that_train_reads_and_runs_are_shared(datasets: Path, tmp_path: Path) -> None:
    config = experiment(
        datasets,
        output=str(tmp_path / "out"),
        match=["tokens", "documents"],
        seeds=[3, 5],
        override={"optimizer.learning_rate": 0.5},
        evaluate_with={"problems": "p.jsonl", "limit": 3},
        ranks=2,
        notes="It's small.",
    )
    config.arms["append"].override["optimizer.clip_gradient_norm"] = 0.25
    planned = prepare(config)
    configs = {path.stem: load_config(TrainConfig, str(path)) for path in (tmp_path / "out/configs").iterdir()}
    longer = planned[-1].tokens
    assert set(configs) == {f"{arm}-{tokens}-seed{seed}" for seed in (3, 5) for arm, tokens in (("vanilla", 1280), ("append", 1280), ("append", longer))}
    one = configs["append-1280-seed5"]
    assert (one.seed, one.tokens, one.steps, one.run_dir) == (5, 1280, None, tmp_path / "out/runs/append-1280-seed5")
    assert (one.optimizer.learning_rate, one.optimizer.clip_gradient_norm) == (0.5, 0.25)
    assert configs["vanilla-1280-seed5"].optimizer.clip_gradient_norm == TrainConfig.model_validate(TRAIN).optimizer.clip_gradient_norm
    assert one.data.train_paths == [str(datasets / "data/append/train")]
    assert (one.checkpoint.every_steps, one.validate_every_steps) == (4, 0)
    script = (tmp_path / "out/commands.sh").read_text()
    assert script.count("torchrun --standalone --nproc-per-node=2 --module tpt_megatron.cli train ") == 6
    assert script.count("tpt compare ") == 2
    assert "--notes 'It'\"'\"'s small.'" in script
    assert "tpt evaluate" not in script  # no arm says how


def test_reports_hold_thinking_against_a_difficulty_that_may_come_later(datasets: Path, tmp_path: Path) -> None:
    prepare(experiment(datasets, output=str(tmp_path)))
    assert "--difficulty" not in (tmp_path / "commands.sh").read_text()
    prepare(experiment(datasets, output=str(tmp_path), difficulty="corpus", difficulty_field="level"))
    (line,) = [line for line in (tmp_path / "commands.sh").read_text().splitlines() if line.startswith("tpt compare")]
    assert "--difficulty corpus --difficulty-field level" in line
    with pytest.raises(ConfigError, match="difficulty_field names a field of record files"):
        experiment(datasets, difficulty_field="level")


def test_another_experiment_in_the_same_folder_is_refused_and_more_seeds_are_not(datasets: Path, tmp_path: Path) -> None:
    prepare(experiment(datasets, output=str(tmp_path)))
    prepare(experiment(datasets, output=str(tmp_path), seeds=[1, 2]))
    with pytest.raises(ConfigError, match="holds an experiment with another override, tokens; give another output"):
        prepare(experiment(datasets, output=str(tmp_path), tokens=1344, override={"seed": 4}))
    (tmp_path / "plan.json").write_text('{"arms": []}')
    with pytest.raises(ConfigError, match=r"plan\.json: not a plan of tpt experiment; give another output"):
        prepare(experiment(datasets, output=str(tmp_path)))
