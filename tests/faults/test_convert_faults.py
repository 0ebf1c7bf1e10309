"""Conversions that are killed, stopped, or run out of disk: nothing half made has a name, and the same command then succeeds. Real processes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, LlamaConfig

from tests.support.disks import small_disk
from tests.support.families import KEPT, configs, edit_config, random_model, save_model, tensors_of
from tests.support.ranks import WarmRanks
from tpt_megatron.checkpoints import damages, read_checksums
from tpt_megatron.convert import export, importing
from tpt_megatron.convert.export import export_checkpoint
from tpt_megatron.convert.importing import import_model
from tpt_megatron.errors import MachineError

MEGABYTES = 180


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model folder that takes a while, and its checkpoint."""
    root = tmp_path_factory.mktemp("large")
    layers, hidden, ffn = MEGABYTES // 30, 512, 4096
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    (root / "source").mkdir()
    config.dtype = "float32"
    config.save_pretrained(root / "source")
    shapes = {"model.embed_tokens.weight": (512, hidden), "model.norm.weight": (hidden,)}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        shapes |= {f"model.layers.{layer}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"model.layers.{layer}.mlp.{name}_proj.weight": (ffn, hidden) for name in ("gate", "up")}
        shapes |= {f"model.layers.{layer}.mlp.down_proj.weight": (hidden, ffn)}
    save_file({name: torch.full(shape, float(number)) for number, (name, shape) in enumerate(shapes.items())}, root / "source" / "model.safetensors")
    return root / "source", import_model(root / "source", root / "checkpoints")


def interrupted(words: list[str], parent: Path, name: str, number: signal.Signals) -> subprocess.CompletedProcess[str]:
    """Run `tpt convert`, and send the signal when tensors of the output `name` in `parent` are being written."""
    command = [sys.executable, "-m", "tpt_megatron.cli", "convert", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 60
    while not any(
        path.stat().st_size for folder in parent.glob(f".{name}.{process.pid}.tmp") for path in folder.glob("*") if path.suffix in (".distcp", ".safetensors")
    ):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def everything(root: Path) -> list[str]:
    return sorted(path.name for path in root.rglob("*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_import_that_is_ended_leaves_no_checkpoint_and_can_be_repeated(number: signal.Signals, large: tuple[Path, Path], tmp_path: Path) -> None:
    source, whole = large
    output = tmp_path / "out"
    ended = interrupted(["import", str(source), str(output)], output, "iter_0000000", number)
    if number == signal.SIGTERM:
        assert ended.returncode == 3
        assert ended.stderr.splitlines()[-1].startswith("tpt: stopped by a signal")
        assert "Traceback" not in ended.stderr
        assert not output.exists()
    else:
        assert ended.returncode == -signal.SIGKILL
        assert [path.name for path in output.iterdir() if not path.name.startswith(".")] == []
    folder = import_model(source, output)
    assert sorted(path.name for path in output.iterdir()) == ["iter_0000000", "latest_checkpointed_iteration.txt"]
    assert everything(folder) == everything(whole)
    assert damages(folder, read_checksums(folder) or []) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_export_that_is_ended_leaves_no_folder_and_can_be_repeated(number: signal.Signals, large: tuple[Path, Path], tmp_path: Path) -> None:
    source, whole = large
    output = tmp_path / "out"
    ended = interrupted(["export", str(whole), str(output)], tmp_path, "out", number)
    assert not output.exists()
    if number == signal.SIGTERM:
        assert ended.returncode == 3
        assert ended.stderr.splitlines()[-1].startswith("tpt: stopped by a signal")
        assert "Traceback" not in ended.stderr
        assert everything(tmp_path) == []
    else:
        assert ended.returncode == -signal.SIGKILL
        assert everything(tmp_path) != [], "what was killed had written nothing yet: the test says little"
    export_checkpoint(whole, output)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    found = tensors_of(output)
    assert all(torch.equal(tensor, found[name]) for name, tensor in tensors_of(source).items())
    assert AutoConfig.from_pretrained(output).num_hidden_layers == MEGABYTES // 30


def test_an_import_that_is_killed_before_its_folder_has_its_name_can_be_repeated(tmp_path: Path) -> None:
    """The tracker is there by then."""
    source = save_model(random_model(configs()["llama"]), tmp_path / "source")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "latest_checkpointed_iteration.txt").write_text("0\n")
    import_model(source, tmp_path / "out")
    assert (tmp_path / "out" / "iter_0000000" / "tpt.json").is_file()


def test_what_another_process_is_writing_is_left_alone(tmp_path: Path) -> None:
    source = save_model(random_model(configs()["llama"]), tmp_path / "source")
    others = [tmp_path / "out" / name for name in (f".iter_0000000.{os.getppid()}.tmp", ".iter_0000000.mine.tmp", ".iter_0000001.4194304.tmp")]
    dead = tmp_path / "out" / ".iter_0000000.4194304.tmp"  # more than a process id can be
    for folder in (*others, dead):
        folder.mkdir(parents=True)
    import_model(source, tmp_path / "out")
    assert all(folder.is_dir() for folder in others)
    assert not dead.exists()


@pytest.mark.parametrize("direction", ["import", "export"])
def test_a_disk_that_is_full_half_way_is_one_line_and_leaves_nothing(
    direction: str, large: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something else fills it meanwhile: there was room enough when the conversion began."""
    source, whole = large
    for module in (importing, export):
        monkeypatch.setattr(module, "check_room", lambda *room: None)
    with small_disk(tmp_path / "disk", 40) as disk:
        with pytest.raises(MachineError) as error:
            import_model(source, disk / "out") if direction == "import" else export_checkpoint(whole, disk / "out")
        assert str(error.value) == f"{disk / 'out'}: cannot be written: No space left on device; nothing was left behind"
        assert everything(disk) == []
        assert shutil.disk_usage(disk).used < 1e6
        subprocess.run(["mount", "-o", f"remount,size={2 * MEGABYTES}m", str(disk)], check=True)
        import_model(source, disk / "out") if direction == "import" else export_checkpoint(whole, disk / "out")


def test_a_file_that_may_not_grow_is_one_line_too(large: tuple[Path, Path], tmp_path: Path) -> None:
    """As under a quota; where no file system can be mounted, this is what shows a write that fails half way."""
    source, whole = large
    limit = f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({MEGABYTES // 4} << 20,) * 2); from tpt_megatron.cli import main; main()"
    for words in (["import", str(source)], ["export", str(whole)]):
        command = [sys.executable, "-c", limit, "convert", *words, str(tmp_path / "out")]
        ended = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert ended.returncode == 1
        assert ended.stderr.splitlines()[-1] == f"tpt: {tmp_path / 'out'}: cannot be written: File too large; nothing was left behind"
        assert "Traceback" not in ended.stderr
        assert everything(tmp_path) == []


def test_the_command_line_says_what_was_done_and_what_cannot_be(warm_ranks: WarmRanks, tmp_path: Path) -> None:
    source = save_model(random_model(configs()["qwen2-tied"]), tmp_path / "source")

    def convert(*words: object, exit_code: int = 0) -> list[str]:
        ended = warm_ranks.run("convert", *(str(word) for word in words))
        assert ended.returncode == exit_code, ended.stderr
        assert "Traceback" not in ended.stderr
        return ended.stdout.splitlines() if exit_code == 0 else ended.stderr.splitlines()

    said = convert("import", source, tmp_path / "checkpoints")
    assert said == [f"{tmp_path / 'checkpoints' / 'iter_0000000'}: start from it with checkpoint.load_from={tmp_path / 'checkpoints'} checkpoint.load=weights"]
    said = convert("export", tmp_path / "checkpoints", tmp_path / "export", "--dtype", "bf16", "--verify")
    assert said[0] == f"{tmp_path / 'export'}: a Hugging Face model folder"
    assert said[1].startswith("verified: 50 tensors are equal, logits differ by at most")
    assert (tmp_path / "export" / "chat_template.jinja").read_bytes() == KEPT["chat_template.jinja"]

    (usage,) = convert("import", source, tmp_path / "checkpoints", exit_code=2)
    assert usage == f"tpt: {tmp_path / 'checkpoints'}: holds checkpoints already; name another folder"
    edit_config(source, rope_theta=7.0)
    (failed,) = convert("import", source, tmp_path / "new", exit_code=1)
    assert failed.startswith(f"tpt: {source / 'config.json'}: rope_parameters and rope_theta")
    assert not (tmp_path / "new").exists()
