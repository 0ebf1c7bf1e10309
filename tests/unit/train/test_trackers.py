import struct
from pathlib import Path

import pytest

from tpt_megatron.config.watching import WandbConfig, WatchConfig
from tpt_megatron.errors import MachineError
from tpt_megatron.train.trackers import Trackers

pytestmark = pytest.mark.filterwarnings("default")  # of protobuf, and of what writes in the background


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_tensorboard_has_every_number_and_forgets_what_a_resumed_run_takes_back(tmp_path: Path) -> None:
    config = WatchConfig(tensorboard=True)
    with Trackers(config, tmp_path, 0, {}) as trackers:
        for step in (1, 2, 3):
            trackers.write({"step": step, "loss": step / 2, "loss_by_source": {"web": 1.5}, "note": "text"})
    with Trackers(config, tmp_path, 2, {}) as trackers:
        trackers.write({"step": 3, "loss": 9.0, "loss_by_source": {"web": 1.5}})
    found = scalars(tmp_path / "tensorboard")
    assert found == {"loss": [(1, 0.5), (2, 1.0), (3, 9.0)], "loss_by_source/web": [(1, 1.5), (2, 1.5), (3, 1.5)]}


def test_tensorboard_forgets_what_a_run_that_goes_back_takes_back(tmp_path: Path) -> None:
    with Trackers(WatchConfig(tensorboard=True), tmp_path, 0, {}) as trackers:
        for step in (1, 2, 3):
            trackers.write({"step": step, "loss": step / 2})
        trackers.take_back(1)
        trackers.write({"step": 2, "loss": 9.0})
    assert scalars(tmp_path / "tensorboard") == {"loss": [(1, 0.5), (2, 9.0)]}


def test_wandb_keeps_what_a_run_that_went_back_does_again(tmp_path: Path) -> None:
    with Trackers(WatchConfig(wandb=WandbConfig(project="p", mode="offline")), tmp_path, 0, {}) as trackers:
        for step in (1, 2, 1, 2, 3):
            trackers.write({"step": step, "loss": 0.5})
    (path,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert logged_steps(path) == [1, 2, 1, 2, 3]


def logged_steps(path: Path) -> list[int]:
    """Return the values of `step` in the file that `wandb sync` reads: behind 7 bytes, records with a checksum, a length and a type before each."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, found, at = path.read_bytes(), [], 7
    assert len(data) < 1 << 15, "records of larger files are cut into blocks"
    while at < len(data):
        _, length, _ = struct.unpack_from("<IHB", data, at)
        record = Record.FromString(data[at + 7 : at + 7 + length])
        found += [int(item.value_json) for item in record.history.item if "step" in (item.key, *item.nested_key)]
        at += 7 + length
    return found


def test_wandb_without_a_login_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # where a login would be
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(MachineError, match=r"^watch\.wandb: No API key configured.*; or set watch\.wandb\.mode=offline"):
        Trackers(WatchConfig(wandb=WandbConfig(project="p")), tmp_path / "run", 0, {})


def test_wandb_works_offline_and_a_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    config = WatchConfig(wandb=WandbConfig(project="p", mode="offline"))
    for _ in range(2):
        with Trackers(config, tmp_path, 0, {"seed": 1}) as trackers:
            trackers.write({"step": 1, "loss": 0.5})
    folders = [path.name for path in (tmp_path / "wandb").glob("offline-run-*")]
    identity = (tmp_path / "wandb-id.txt").read_text()
    assert folders  # their names have the time, the run's id, and a number where both began within a second
    assert all(identity in folder for folder in folders), folders
