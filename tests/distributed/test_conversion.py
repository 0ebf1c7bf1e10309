"""What is imported computes what transformers computes, under every layout; training starts from it, and goes out as what came in. Real processes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.families import KEPT, configs, logits, random_model, save_model, tensors_of
from tests.support.ranks import WarmRanks
from tpt_megatron.convert.checkpoint_reader import read_record
from tpt_megatron.convert.export import export_checkpoint
from tpt_megatron.convert.hugging_face import read_config
from tpt_megatron.convert.importing import import_model

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP1": (1, {}),
    "TP2": (2, {"tensor_parallel": 2}),
    "PP2": (2, {"pipeline_parallel": 2}),
    "EP2": (2, {"expert_parallel": 2}),
}
Sources = dict[str, tuple[Path, Path, torch.Tensor]]
CASES = list(configs())
BOUND = 2e-5
TOKENS = torch.randint(0, 257, (2, 96), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """By case: the model folder, its checkpoint, and transformers' logits."""
    root = tmp_path_factory.mktemp("imported")
    made = {}
    for case, config in configs().items():
        model = random_model(config)
        source = save_model(model, root / case)
        made[case] = (source, import_model(source, root / f"{case}-checkpoints"), logits(model, TOKENS))
    return made


Computed = Callable[[str], dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def computed(sources: Sources, warm_ranks: WarmRanks, tmp_path_factory: pytest.TempPathFactory) -> Computed:
    """For a layout: megatron-core's logits of every case, all of them computed by the same ranks."""

    @cache
    def of(layout: str) -> dict[str, torch.Tensor]:
        ranks, parallel = LAYOUTS[layout]
        cases = [case for case in sources if layout != "EP2" or "moe" in case]
        folder = tmp_path_factory.mktemp("logits")
        job = {"parallel": parallel, "tokens": TOKENS.tolist(), "outputs": {str(sources[case][1]): str(folder / case) for case in cases}}
        (folder / "job.json").write_text(json.dumps(job))
        ended = warm_ranks.run(str(folder / "job.json"), module="tests.distributed.logits_worker", ranks=ranks)
        assert ended.returncode == 0, ended.stderr[-8000:]
        found = {case: [torch.load(path) for path in sorted(folder.glob(f"{case}.*"))] for case in cases}
        assert all(len(of_ranks) == (1 if layout in ("TP1", "PP2") else 2) for of_ranks in found.values())
        return {case: torch.stack(of_ranks) for case, of_ranks in found.items()}

    return of


@pytest.mark.parametrize(("case", "layout"), [(case, layout) for layout in LAYOUTS for case in CASES if layout != "EP2" or "moe" in case])
def test_logits_are_transformers(case: str, layout: str, sources: Sources, computed: Computed) -> None:
    theirs, ours = sources[case][2], computed(layout)[case]
    assert ours.shape[1:] == theirs.shape
    assert theirs.std() > 0.5, "logits that are all but equal say little"
    assert (ours - theirs).abs().max() <= BOUND


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset in the tokens of the sources' tokenizer, and the same texts in words."""
    root = tmp_path_factory.mktemp("data")
    (root / "in.jsonl").write_text("".join(json.dumps({"text": f"document {i} says {i % 7}, and so on, and so on"}) + "\n" for i in range(60)))
    (root / "tokenizer.json").write_bytes(KEPT["tokenizer.json"])
    (root / "config.yaml").write_text(
        f"input: {root}/in.jsonl\noutput: {root}/out\ntokenizer: {root}/tokenizer.json\narms: [vanilla]\nvalidation_fraction: 0\n"
    )
    subprocess.run([sys.executable, "-m", "tpt_megatron.cli", "preprocess", str(root / "config.yaml")], check=True, capture_output=True)
    return root / "out" / "vanilla" / "train"


@pytest.mark.parametrize(
    ("case", "precision", "parallel"),
    [
        ("llama-tied-scaled", "bf16", {"tensor_parallel": 2}),
        ("qwen2", "fp32", {"tensor_parallel": 2}),
        ("qwen3_moe", "fp32", {"tensor_parallel": 2, "sequence_parallel": True}),
    ],
)
def test_training_starts_from_it_and_goes_out_as_what_came_in(
    case: str, precision: str, parallel: dict[str, Any], sources: Sources, dataset: Path, warm_ranks: WarmRanks, tmp_path: Path
) -> None:
    source, imported, _ = sources[case]
    shutil.copytree(imported.parent, tmp_path / "imported")
    model = read_record(imported).model
    config = {
        "run_dir": str(tmp_path / "run"),
        "model": model.model_dump(mode="json") | {"head_dim": model.head_size},  # spelled out, as presets do, whether the source did or not
        "data": {"train": str(dataset), "sequence_length": 32},
        "parallel": parallel,
        "precision": precision,
        "global_batch_sequences": 2,
    }
    (tmp_path / "train.yaml").write_text(json.dumps(config))

    def train(steps: int, learning_rate: float) -> Path:
        starting = (f"checkpoint.load_from={tmp_path / 'imported'}", "checkpoint.load=weights")
        ended = warm_ranks.run("train", str(tmp_path / "train.yaml"), f"steps={steps}", f"optimizer.learning_rate={learning_rate}", *starting, ranks=2)
        assert ended.returncode == 0, ended.stderr[-5000:]
        export = tmp_path / f"export-{steps}"
        assert export_checkpoint(tmp_path / "run", export).name == f"iter_{steps:07d}"
        return export

    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    before = {name: tensor.to(kind) for name, tensor in tensors_of(source).items()}
    first = train(2, 1e-12)
    shutil.rmtree(tmp_path / "imported")  # what it was imported with is the run's own from its first start on
    later = train(4, 1e-2)
    for export in (first, later):
        for name, content in KEPT.items():
            assert (export / name).read_bytes() == content, name
        asked_for = {key: str(kind).removeprefix("torch.") if key == "dtype" else value for key, value in read_config(source).items()}
        assert asked_for.items() <= read_config(export).items()
        after = tensors_of(export)
        assert {name: (tensor.shape, tensor.dtype) for name, tensor in after.items()} == {name: (tensor.shape, kind) for name, tensor in before.items()}
        if export == first:  # steps too small to be seen: what training started from
            for name, tensor in after.items():
                torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-7)
        else:
            assert not torch.allclose(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"], atol=1e-3)


def test_a_run_that_starts_anew_from_another_model_forgets_the_first(sources: Sources, dataset: Path, warm_ranks: WarmRanks, tmp_path: Path) -> None:
    """As when the first start fails before it saves anything; the second is from a model with another chat template."""
    _, imported, _ = sources["llama"]
    other = Path(shutil.copytree(imported.parent, tmp_path / "other"))
    (other / "iter_0000000" / "hugging_face.chat_template.jinja").write_text("the second's")
    (other / "iter_0000000" / "hugging_face.merges.txt").unlink()
    (other / "iter_0000000" / "checksums.json").unlink()
    config = {
        "run_dir": str(tmp_path / "run"),
        "model": read_record(imported).model.model_dump(mode="json"),
        "data": {"train": str(dataset), "sequence_length": 32},
        "optimizer": {"learning_rate": 1e-3},
        "global_batch_sequences": 2,
        "steps": 1,
    }
    (tmp_path / "train.yaml").write_text(json.dumps(config))
    for load_from in (imported.parent, other):
        shutil.rmtree(tmp_path / "run" / "checkpoints", ignore_errors=True)
        ended = warm_ranks.run("train", str(tmp_path / "train.yaml"), f"checkpoint.load_from={load_from}", "checkpoint.load=weights")
        assert ended.returncode == 0, ended.stderr[-5000:]
    export_checkpoint(tmp_path / "run", tmp_path / "export")
    assert (tmp_path / "export" / "chat_template.jinja").read_text() == "the second's"
    assert not (tmp_path / "export" / "merges.txt").exists()
