"""What `tpt inspect` says of checkpoints, runs and Hugging Face folders, and what it finds wrong with them."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from tests.support.families import configs, random_model, save_model
from tpt_megatron.convert.importing import import_model
from tpt_megatron.errors import CheckpointError, DataError, UsageError
from tpt_megatron.inspection.show import inspect_path


def page(path: Path, *, check: bool = False) -> str:
    out = io.StringIO()
    inspect_path(path, Console(file=out, width=160), documents=0, plot=None, check=check)
    return out.getvalue()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Hugging Face folder in several shards, and the run folder of checkpoints that it was imported to."""
    root = tmp_path_factory.mktemp("models")
    config = configs()["llama-tied-scaled"]
    folder = save_model(random_model(config), root / "hf")
    import_model(folder, root / "run/checkpoints")
    return folder, root / "run"


@pytest.fixture
def copied(made: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    return Path(shutil.copytree(made[0], tmp_path / "hf")), Path(shutil.copytree(made[1], tmp_path / "run"))


def test_a_hugging_face_folder_is_told_from_its_headers(made: tuple[Path, Path]) -> None:
    parameters = sum(parameter.numel() for parameter in random_model(configs()["llama-tied-scaled"]).parameters())
    shown = page(made[0])
    assert "Hugging Face      llama, LlamaForCausalLM" in shown
    assert f"{parameters:,} in 38 tensors: {parameters:,} F32" in shown
    assert "embeddings        tied" in shown and "'factor': 8.0" in shown and "tokenizer.json" in shown
    shards = len(list(made[0].glob("*.safetensors")))
    assert shards > 1 and page(made[0], check=True).startswith(f"{shards} file(s), 38 tensors: ok")


def test_checkpoints_are_told_from_their_records(made: tuple[Path, Path]) -> None:
    for path in (made[1], made[1] / "checkpoints", made[1] / "checkpoints/iter_0000000"):
        shown = page(path)
        assert ("latest" in shown) == (path.name != "iter_0000000")
        assert "num_layers 4, hidden_size 48, ffn_hidden_size 80, num_heads 6, num_query_groups 2, head_dim 12, vocab_size 263" in shown
        assert "precision         fp32" in shown and "checksums         recorded" in shown
        assert page(path, check=True) == "iter_0000000: ok\n"


def test_damage_is_found(copied: tuple[Path, Path]) -> None:
    folder, run = copied
    data = run / "checkpoints/iter_0000000/__0_0.distcp"
    whole = data.read_bytes()
    data.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DataError, match=r"1 finding\(s\), see above; continue from a checkpoint that is whole"):
        page(run, check=True)
    (run / "checkpoints/iter_0000000/tpt.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tpt\.json: missing or damaged"):
        page(run)
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    whole = first.read_bytes()
    for damaged, message in (
        (whole[:-4], "the file was cut off or has grown"),
        (whole + b"x", "has grown"),
        (whole[:5], "no safetensors header"),
        (b"", "header"),
    ):
        first.write_bytes(damaged)
        for check in (False, True):
            with pytest.raises(DataError, match=f"{first.name}: .*{message}"):
                page(folder, check=check)
    shutil.copyfile(second, first)
    with pytest.raises(DataError, match="do not name the same tensors"):
        page(folder)
    first.unlink()
    with pytest.raises(DataError, match=rf"names {first.name}, which is not there"):
        page(folder)


def test_a_checkpoint_without_checksums_says_so(copied: tuple[Path, Path]) -> None:
    (copied[1] / "checkpoints/iter_0000000/checksums.json").unlink()
    assert "none recorded" in page(copied[1])
    assert "no checksums recorded: nothing to compare with" in page(copied[1], check=True)


def test_a_run_that_saved_nothing_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1}) + "\n")
    with pytest.raises(UsageError, match="a checkpoint, a run, or a Hugging Face model folder"):
        page(tmp_path / "nothing")


def test_it_needs_no_torch(made: tuple[Path, Path]) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from pathlib import Path; from rich.console import Console\n"
        "from tpt_megatron.inspection.show import inspect_path\n"
        f"for path in {[str(path) for path in made]}: inspect_path(Path(path), Console(), documents=0, plot=None, check=True)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.count("ok") == 2
