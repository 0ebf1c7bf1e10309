"""`tpt plan`: what it counts, what it refuses, and what it prints."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tpt_megatron.mcore  # noqa: F401 - before megatron
from tests.support.train_runs import preprocess_corpus, write_train_config
from tpt_megatron.config.experiment import ExperimentConfig
from tpt_megatron.config.load import check_config, load_config, read_values, recipe_names
from tpt_megatron.config.stages import kind_to_plan
from tpt_megatron.config.train import TrainConfig
from tpt_megatron.errors import ConfigError, UsageError
from tpt_megatron.launch.gpus import find_gpu
from tpt_megatron.launch.plan import plan_training
from tpt_megatron.launch.planned import planned_config
from tpt_megatron.launch.planning import plan_arms, plan_search, refuse_what_does_not_fit, with_data
from tpt_megatron.launch.search import candidates, search
from tpt_megatron.mcore.model import count_parameters
from tpt_megatron.mcore.simulation import simulate, simulate_stages

pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("UserWarning", "DeprecationWarning")]  # of megatron-core
H100 = find_gpu("h100")
LLAMA_70B = {"num_layers": 80, "hidden_size": 8192, "ffn_hidden_size": 28_672, "num_heads": 64, "num_query_groups": 8, "vocab_size": 128_256}


def run(**values: Any) -> TrainConfig:
    """A run of Llama 3 8B's shape, 100 steps of 512 sequences of 8k tokens, where nothing else is said."""
    return check_config(
        TrainConfig,
        {
            "run_dir": "unused",
            "model": "llama-3-8b",
            "data": {"train": "unused", "sequence_length": 8192},
            "optimizer": {"learning_rate": 3e-4},
            "precision": "bf16",
            "steps": 100,
            "global_batch_sequences": 512,
        }
        | values,
        "test",
    )


def test_8b_on_32_is_its_parameters_in_full_and_a_part_of_the_optimizer() -> None:
    """2 bytes a weight and 4 a gradient on every rank; 12 a parameter over all ranks."""
    config = run()
    plan = plan_training(config, 32, H100, mfu=0.5)
    (stage,) = plan.stages
    assert plan.parameters == stage.held.parameters == 8_030_261_248
    assert stage.held.parameter_bytes == pytest.approx(2 * plan.parameters, rel=1e-4)
    assert stage.held.gradient_bytes == 2 * stage.held.parameter_bytes
    assert stage.held.optimizer_bytes == pytest.approx(12 * plan.parameters / 32, rel=1e-4)
    assert (plan.steps, plan.tokens, plan.micro_batches, plan.bubble) == (100, 100 * 512 * 8192, 16, 0)
    assert plan.flops_a_token == pytest.approx(51.47e9, rel=1e-3)
    assert plan.seconds == pytest.approx(51.47e9 * 100 * 512 * 8192 / (32 * 989.4e12 * 0.5), rel=1e-3)
    assert plan.gpu_hours == pytest.approx((plan.seconds or 0) * 32 / 3600)
    with pytest.raises(ConfigError, match=r"DP32 does not fit: pipeline stage 0 needs GPUs of 93\.6 GB, and an H100 has 78\.7 GB for it; --search"):
        refuse_what_does_not_fit(config, plan, H100)
    refuse_what_does_not_fit(config, plan, find_gpu("H200"))


def test_70b_on_512_has_every_parameter_in_one_stage_or_another() -> None:
    """Of one tensor-parallel rank: matrices are cut in eight, norms are whole."""
    layout = {"tensor_parallel": 8, "sequence_parallel": True, "pipeline_parallel": 4, "virtual_pipeline": 5}
    config = run(model=LLAMA_70B, parallel=layout, global_batch_sequences=1024)
    plan = plan_training(config, 512, H100, mfu=0.4)
    norms = 80 * 2 * 8192 + 8192
    assert sum(stage.held.parameters for stage in plan.stages) == (count_parameters(config.model) - norms) // 8 + norms
    assert [stage.held.rank for stage in plan.stages] == [0, 128, 256, 384]
    kept = [stage.activations.kept for stage in plan.stages]
    assert kept == sorted(kept, reverse=True), "earlier stages have more under way"
    assert [stage.activations.logits > 0 for stage in plan.stages] == [False, False, False, True]
    refuse_what_does_not_fit(config, plan, H100)


def test_experts_of_1024_ranks_are_shared() -> None:
    config = run(model="qwen3-30b-a3b", parallel={"pipeline_parallel": 4, "expert_parallel": 16}, global_batch_sequences=2048)
    plan = plan_training(config, 1024, H100, mfu=0.4)
    experts = 48 * 128 * 3 * 2048 * 768
    assert sum(stage.held.parameters for stage in plan.stages) == count_parameters(config.model) - experts + experts // 16
    refuse_what_does_not_fit(config, plan, H100)


def test_stages_between_are_what_they_would_be_if_they_were_built() -> None:
    config = run(model=LLAMA_70B | {"num_layers": 10}, parallel={"pipeline_parallel": 5}, global_batch_sequences=20)
    assert simulate_stages(config, 10) == simulate(config, 10, range(0, 10, 2))


def test_fp8_weights_beside_bf16_ones_are_two_bytes_a_matrix_entry() -> None:
    plain, both, alone = (
        plan_training(run(**fp8), 32, H100, mfu=0.4).stages[0] for fp8 in ({}, {"fp8": "tensorwise"}, {"fp8": "tensorwise", "fp8_parameters": True})
    )
    tied = plan_training(run(model="qwen3-4b", parallel={"pipeline_parallel": 2}, fp8="tensorwise"), 32, H100, mfu=0.4).stages
    assert tied[0].fp8_bytes == pytest.approx(tied[1].fp8_bytes, rel=1e-4), "half of the layers each; embeddings, which both have, are not multiplied in FP8"
    embeddings = 2 * 128_256 * 4096
    assert both.fp8_bytes == 2 * (8_030_261_248 - embeddings) and plain.fp8_bytes == alone.fp8_bytes == 0
    assert both.activations.kept < plain.activations.kept, "inputs of matrix products are kept in one byte"


def test_the_embedding_of_multi_token_prediction_on_the_last_stage_is_not_in_fp8() -> None:
    config = run(model={"preset": "llama-3-8b", "mtp_layers": 1}, fp8="tensorwise", parallel={"pipeline_parallel": 2})
    width = 4096
    layer = (8_030_261_248 - 2 * 128_256 * width - width) // 32
    first, last = (stage.fp8_bytes // 2 for stage in plan_training(config, 32, H100, mfu=0.4).stages)
    assert first == 16 * layer
    assert last == 17 * layer + 2 * width**2 + 3 * width + width, "one layer more, its product and three norms, and the last norm"


@pytest.mark.parametrize(
    ("values", "world", "message"),
    [
        ({"parallel": {"tensor_parallel": 3}}, 6, "tensor_parallel=3 does not divide model.num_heads=32"),
        ({"parallel": {"pipeline_parallel": 4}}, 6, r"parallel.pipeline_parallel=4 does not divide the 6 rank\(s\) of this job"),
        (
            {},
            24,
            r"global_batch_sequences=512 is not a multiple of micro_batch_sequences=1 x 24 data-parallel rank\(s\) = 24; the nearest that are: 504 and 528",
        ),
        ({"global_batch_sequences": 8}, 16, r"x 16 data-parallel rank\(s\) = 16; the least that is one: 16$"),
        ({"parallel": {"context_parallel": 2}}, 8, "data.attention=document with parallel.context_parallel=2 is not supported on CUDA"),
        (
            {"parallel": {"pipeline_parallel": 4, "virtual_pipeline": 2}, "global_batch_sequences": 6},
            4,
            "virtual_pipeline=2 needs micro-batches in multiples of parallel.pipeline_parallel=4, and a batch of 6 gives each data-parallel rank 6; "
            "make it a multiple of 4",
        ),
        ({"model": LLAMA_70B | {"vocab_size": 0}}, 8, "model.vocab_size=0 takes the dataset's, which is not there yet; give model.vocab_size"),
    ],
)
def test_what_a_cluster_would_refuse_is_refused(values: dict[str, Any], world: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_training(run(**values), world, H100, mfu=0.4)


@pytest.mark.parametrize(
    ("gpu", "recipe", "message"),
    [
        ("a100", "delayed", "fp8=delayed cannot be done on an A100; set fp8=none"),
        ("h100", "mxfp8", "fp8=mxfp8 cannot be done on an H100; set fp8=delayed, tensorwise, blockwise or none"),
    ],
)
def test_fp8_that_the_chip_does_not_have_is_refused_with_and_without_search(gpu: str, recipe: str, message: str) -> None:
    for plan in (plan_training, plan_search):
        with pytest.raises(ConfigError, match=f"^{message}$"):
            plan(run(fp8=recipe), 32, find_gpu(gpu), 0.4)


def test_search_finds_layouts_that_fit_and_the_trainer_takes() -> None:
    """8B on 32 H100s: data parallelism alone does not fit, as above."""
    config = run(global_batch_sequences=64)
    found, possible = search(config, 32, H100, 0.4, most=5)
    assert possible == len(list(candidates(config, 32, 8))) > 100
    assert len(found) == 5
    times = [entry.time.total for entry in found]
    assert times == sorted(times)
    for entry in found:
        assert entry.plan.fullest.total <= H100.usable
        assert entry.plan.data_parallel * entry.config.parallel.model_ranks == 32
    assert all(entry.config.parallel != config.parallel or entry.config.recompute == "full" for entry in found)


def test_candidates_are_all_that_a_search_by_hand_finds() -> None:
    """What is left out early would be refused by the checks."""
    config = run(model="cpu-experts", global_batch_sequences=12)
    config = config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": 1024})})
    found = {
        (c.parallel.tensor_parallel, c.parallel.pipeline_parallel, c.parallel.virtual_pipeline, c.parallel.expert_parallel, c.micro_batch_sequences)
        for c in candidates(config, 4, 8)
    }
    assert found == {
        (tp, pp, vp, ep, micro)
        for tp in (1, 2)
        for pp in (1, 2, 4)
        if tp * pp <= 4
        for vp in ((1, 2, 4) if pp > 1 else (1,))
        if 4 % (pp * vp) == 0
        for ep in (1, 2, 4)
        if (4 // (tp * pp)) % ep == 0
        for micro in (1, 2, 4)
        if 12 % (micro * 4 // (tp * pp)) == 0 and (vp == 1 or 12 // (micro * 4 // (tp * pp)) % pp == 0)
    }


def test_no_layout_that_fits_is_said() -> None:
    with pytest.raises(ConfigError, match="no layout of this model fits on 1 x A100 40GB, of 8 that are possible; give it more GPUs, or larger ones"):
        plan_search(run(), 1, find_gpu("a100-40gb"), 0.4)


RECIPES = {name: kind_to_plan(read_values(name)[0]) for name in recipe_names()}
FITS = {"paper-pretrain-8b": 16, "paper-midtrain-7b": 16}
"""GPUs of 80 GB that a recipe says it fits on, where these are not 8."""


@pytest.mark.parametrize("name", [name for name, kind in RECIPES.items() if kind == "train"])
def test_every_recipe_of_training_can_be_planned_and_fits(name: str) -> None:
    """They leave run folder, data and the checkpoint to start from to the user."""
    config = with_data(planned_config(name, ["model.vocab_size=1000"] if name == "demo-train" else []))
    plan = plan_training(config, 1 if name == "demo-train" else FITS.get(name, 8), H100, mfu=0.4)
    assert plan.parameters == count_parameters(config.model)
    refuse_what_does_not_fit(config, plan, H100)


PAPER_RUNS = {
    # parameters to two digits, steps, tokens a step, learning rate, schedule, clipping, weight decay, second beta, warm-up
    "paper-pretrain-8b": (8.0e9, 25_000, 4 << 20, 3e-4, "constant", 1.0, 0.1, 0.95, 100),
    "paper-midtrain-1.5b": (1.54e9, 12_500, 8 << 20, 6e-5, "cosine", 0.3, 0.1, 0.95, 100),
    "paper-midtrain-3b": (3.2e9, 12_500, 8 << 20, 4e-5, "cosine", 0.3, 0.1, 0.95, 100),
    "paper-midtrain-7b": (7.6e9, 12_500, 8 << 20, 3e-5, "cosine", 0.3, 0.1, 0.95, 100),
    "sft-train": (1.54e9, None, 1 << 20, 6e-5, "cosine", 0.2, 0.0, 0.999, 400),
    "paper-sft-3b": (3.2e9, None, 1 << 20, 4e-5, "cosine", 0.2, 0.0, 0.999, 400),
    "paper-sft-7b": (7.6e9, None, 1 << 20, 3e-5, "cosine", 0.2, 0.0, 0.999, 400),
}
"""The numbers that arXiv 2509.20186 states."""


@pytest.mark.parametrize("name", PAPER_RUNS)
def test_the_papers_recipes_have_the_papers_numbers(name: str) -> None:
    config = with_data(planned_config(name, []))
    optimizer = config.optimizer
    found = (config.global_batch_sequences * config.data.sequence_length, optimizer.learning_rate, optimizer.schedule)
    found += (optimizer.clip_gradient_norm, optimizer.weight_decay, optimizer.beta2, config.warmup_steps)
    parameters, steps, *stated = PAPER_RUNS[name]
    assert found == tuple(stated)
    assert count_parameters(config.model) == pytest.approx(parameters, rel=0.02)
    assert (config.steps, config.epochs) == ((None, 5) if steps is None else (steps, None))
    assert config.data.sequence_length == (32_768 if steps is None else 8192)
    assert optimizer.beta1 == 0.9


@pytest.mark.parametrize("name", [name for name, kind in RECIPES.items() if kind == "experiment" and name.startswith("paper")])
def test_the_papers_experiments_can_be_planned(name: str) -> None:
    config = load_config(ExperimentConfig, name)
    training, plan, (memory, runs) = plan_arms(config, 64, H100, mfu=0.4)
    refuse_what_does_not_fit(training, plan, H100)
    assert plan.tokens == pytest.approx(config.tokens, rel=1e-4)
    assert memory.row_count == 1 and runs.row_count == 2


def test_every_recipe_is_known_by_its_keys() -> None:
    assert {RECIPES[name] for name in RECIPES if "evaluate" in name} == {"evaluate"}
    assert {RECIPES[name] for name in RECIPES if "preprocess" in name} == {"preprocess"}
    assert {RECIPES[name] for name in RECIPES if "augment" in name} == {"augment"}
    assert [name for name in RECIPES if RECIPES[name] == "experiment"] == ["demo-experiment", "paper-abundant-8b", "paper-constrained-8b"] + [
        f"paper-midtrain-{size}-arms" for size in ("1.5b", "3b", "7b")
    ]
    assert kind_to_plan({"models": {}, "reference": "a"}) == "losses" and kind_to_plan({}) == kind_to_plan({"optimizer": {}, "typo": 1}) == "train"


def test_validation_data_need_not_be_there_where_training_data_are(tmp_path: Path) -> None:
    preprocess_corpus(tmp_path)
    kept = {"every_steps": 2, "keep_last": 2, "keep_best": 1}
    config = str(write_train_config(tmp_path, tmp_path, epochs=1, validate_every_steps=2, checkpoint=kept))
    for words in ([], [f"data.validation={tmp_path}/not-there-yet"]):
        planned = with_data(planned_config(config, words))
        assert planned.steps and planned.model.vocab_size == 257, "of the data"
        assert (planned.validate_every_steps, planned.checkpoint.keep_best) == (2, 1)


def test_an_unknown_gpu_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(UsageError, match="--gpu b300: not known; known are h100, h100-nvl, h200, a100, a100-40gb"):
        find_gpu("b300")


def test_the_command_prints_tables_or_json_and_exits_with_2_where_it_does_not_fit(tmp_path: Path) -> None:
    config = tmp_path / "train.yaml"
    config.write_text(json.dumps(run().model_dump(mode="json", exclude_defaults=True) | {"model": "llama-3-8b"}))

    def tpt(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "tpt_megatron.cli", "plan", str(config), *arguments], capture_output=True, text=True, timeout=300)

    shown = tpt("--world-size", "32", "--gpu", "h200")
    assert shown.returncode == 0, shown.stderr
    assert "8,030,261,248" in shown.stdout and "DP32 on 32 x H200" in shown.stdout
    refused = tpt("--world-size", "32", "--json")
    assert refused.returncode == 2 and refused.stderr.startswith("tpt: DP32 does not fit") and refused.stderr.count("\n") == 1
    told = json.loads(refused.stdout)
    both = tpt("--world-size", "32", "--search", "--json")
    assert both.returncode == 2 and both.stderr == "tpt: --search and --json: give one of them; layouts are ranked in a table alone\n"
    assert told["fits"] is False and told["stages"][0]["held"]["parameters"] == told["parameters"] == 8_030_261_248


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--world-size", "100000"), "is not a multiple of micro_batch_sequences=1 x 100000 data-parallel rank(s) = 100000"),
        (("--world-size", "100001"), "--world-size"),
        (("parallel.tensor_parallel=3",), "parallel.tensor_parallel=3 does not divide model.num_heads=32"),
        (("--gpu", "b300"), "--gpu b300: not known"),
    ],
)
def test_what_needs_no_torch_to_be_told_is_told_without(tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    """A layout that was simulated first would take 100,000 ranks' groups, gigabytes of them."""
    config = tmp_path / "train.yaml"
    config.write_text(json.dumps(run().model_dump(mode="json", exclude_defaults=True) | {"model": "llama-3-8b"}))
    code = "import sys; sys.modules['torch'] = None; from tpt_megatron.cli import main; main()"
    ended = subprocess.run([sys.executable, "-c", code, "plan", str(config), *arguments], capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode == 2
    assert says in ended.stderr
    assert "Traceback" not in ended.stderr


def test_no_layout_at_all_is_not_a_matter_of_memory() -> None:
    with pytest.raises(
        ConfigError, match=r"no layout of this model is possible on 7 GPU\(s\) with global_batch_sequences=512: data-parallel ranks must divide"
    ):
        plan_search(run(), 7, H100, 0.4)


def test_an_augment_config_is_estimated_for_so_many_gpus_and_without_torch(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "seven words that nobody has thought about"}\n' * 3)
    values = {
        "input": str(tmp_path / "in.jsonl"),
        "output": str(tmp_path / "out"),
        "generator": {"kind": "openai", "model": "m", "base_urls": "http://127.0.0.1:9/v1"},
        "document_tokens": None,
        "cost": {"tokens_per_second_per_gpu": 100, "thought_tokens": 6000},
    }
    (tmp_path / "augment.yaml").write_text(json.dumps(values))
    code = "import sys; sys.modules['torch'] = None; from tpt_megatron.cli import app; app()"
    command = [sys.executable, "-c", code, "plan", str(tmp_path / "augment.yaml"), "--world-size", "5"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert shown.returncode == 0, shown.stderr
    assert "GPU-hours" in shown.stdout and "0.05" in shown.stdout, "3 documents x 6,000 tokens / 100 a second"
