from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.token_files import edit_manifest, write_token_files
from tpt_megatron.config.data import DataConfig
from tpt_megatron.config.load import check_config
from tpt_megatron.config.train import TrainConfig
from tpt_megatron.datasets import TokenDataset
from tpt_megatron.errors import ConfigError, DataError, TptError
from tpt_megatron.mcore.engine import LossSums
from tpt_megatron.sequences.stream import Stream
from tpt_megatron.train.data import PADDING, Batches, Kinds, open_run_data, step_batches

LENGTHS = (7, 3, 12, 5, 9)
SPAN = 4


def dataset() -> TokenDataset:
    """Five documents; every token's id is unique, so that a sequence says where it came from. Odd tokens are thinking."""
    lengths = np.array(LENGTHS, np.int32)
    total = sum(LENGTHS)
    pointers = 2 * (np.cumsum(lengths, dtype=np.int64) - lengths)
    return TokenDataset(Path("d"), np.arange(total, dtype=np.uint16), (np.arange(total) % 2).astype(np.uint8), lengths, pointers, {"eod_id": 99})


def batches(**data: Any) -> Batches:
    config = DataConfig.model_validate({"train": "d", "sequence_length": SPAN, **data})
    datasets = {"d": dataset()}
    return Batches(config, Stream(config, config.blends, datasets, 0), datasets, Kinds(datasets))


def test_labels_follow_tokens_and_kinds_and_weights_follow_labels() -> None:
    batch = batches(loss_weights={"document": 0.25, "thinking": 2}).micro_batch(range(8))
    np.testing.assert_array_equal(batch.labels[:, :-1], batch.tokens[:, 1:])
    np.testing.assert_array_equal(batch.kinds, batch.labels % 2)
    np.testing.assert_array_equal(batch.weights, np.where(batch.labels % 2, 2, 0.25))
    for array, dtype in ((batch.tokens, np.int64), (batch.weights, np.float32), (batch.kinds, np.int32)):
        assert array.dtype == dtype
        assert array.flags.c_contiguous


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_documents_are_numbered_by_where_their_tokens_come_from(packing: str) -> None:
    source = batches(packing=packing, sequence_length=15)
    batch = source.micro_batch(range(source.stream.sequences_per_epoch("d")))
    assert batch.documents is not None
    for tokens, documents in zip(batch.tokens, batch.documents, strict=True):
        came_from = np.searchsorted(np.cumsum(LENGTHS), tokens, side="right")
        np.testing.assert_array_equal(came_from[1:] == came_from[:-1], documents[1:] == documents[:-1])
    assert batches(attention="sequence").micro_batch(range(2)).documents is None


def test_padding_has_no_weight_and_a_kind_of_its_own_and_is_the_end_of_document() -> None:
    source = batches(packing="best_fit", sequence_length=15)
    held = source.stream.sequences_per_epoch("d")
    batch = source.micro_batch(range(held))
    padding = batch.labels == 99
    assert padding.sum() == held * 16 - sum(LENGTHS)
    np.testing.assert_array_equal(batch.kinds == 2, padding)
    np.testing.assert_array_equal(batch.weights == 0, padding)
    assert set(batch.tokens.ravel()) | set(batch.labels.ravel()) == {*range(sum(LENGTHS)), 99}


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_step_sees_the_same_sequences_on_any_number_of_ranks(ranks: int) -> None:
    source = batches()
    seen = [batch.tokens for rank in range(ranks) for batch in step_batches(source, 8, global_batch=8, micro_batch=2, rank=rank, ranks=ranks)]
    np.testing.assert_array_equal(np.concatenate(seen), source.micro_batch(range(8, 16)).tokens)


Document = tuple[list[int], list[int], str | None]


def train_config(tmp_path: Path, data: dict[str, Any], **changes: Any) -> TrainConfig:
    values = {
        "run_dir": str(tmp_path / "run"),
        "model": {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_heads": 1, "num_query_groups": 1},
        "data": {"sequence_length": SPAN, **data},
        "optimizer": {"learning_rate": 1e-3},
        "steps": 2,
        "global_batch_sequences": 2,
        **changes,
    }
    return check_config(TrainConfig, values, "test")


def write(prefix: Path, sources: list[str | None], *, sidecars: bool = True) -> str:
    """Write ten documents a source, whose thinking tokens are 100 + and document tokens 0 + its place in `sources`."""
    documents: list[Document] = [([i % len(sources)] * 3, [100 + i % len(sources)] * 4, sources[i % len(sources)]) for i in range(10 * len(sources))]
    write_token_files(prefix, documents, sidecars=sidecars)
    return str(prefix)


def test_kinds_are_source_and_part_and_equal_names_are_one_source(tmp_path: Path) -> None:
    first, second = write(tmp_path / "first", ["web", None]), write(tmp_path / "second", ["books", "web"])
    bare = write(tmp_path / "bare", ["web"], sidecars=False)
    shares = [{"path": path, "weight": 1} for path in (first, second, bare)]
    run = open_run_data(train_config(tmp_path, {"train": shares, "packing": "best_fit", "sequence_length": 7}))
    assert run.kinds.table == [(source, part) for source in ("web", None, "books") for part in ("document", "thinking")] + [(None, PADDING)]
    of = {(path, token): kind for path, ids in ((first, (0, 100, 1, 101)), (second, (1, 101, 0, 100))) for token, kind in zip(ids, (0, 1, 2, 3), strict=True)}
    of |= {(second, 0): 4, (second, 100): 5}
    for number in range(30):
        path, _ = run.train.stream.spans(number)
        batch = run.train.micro_batch(range(number, number + 1))
        for label, kind in zip(batch.labels[0, :6].tolist(), batch.kinds[0, :6].tolist(), strict=True):
            assert kind == (2 if path == bare else of[path, label])  # without sidecars: no source, and all is document


def test_losses_are_told_by_part_and_source_and_padding_is_not_counted(tmp_path: Path) -> None:
    run = open_run_data(train_config(tmp_path, {"train": write(tmp_path / "d", ["web", None]), "packing": "best_fit"}))
    losses = LossSums(1.0, 1.0, np.array([10.0, 40.0, 20.0, 0.0, 7.0]), np.array([10.0, 10.0, 10.0, 0.0, 3.0]))
    assert run.kinds.tokens(losses) == 30
    assert run.kinds.by_part(losses) == {"loss_document": 1.5, "loss_thinking": 4.0}
    assert run.kinds.by_source(losses) == {"web": 2.5, "(none)": 2.0}


def test_validation_sets_have_the_names_that_the_config_gives(tmp_path: Path) -> None:
    train, held_out = write(tmp_path / "train", ["web"]), write(tmp_path / "held_out", ["books"])
    plain = open_run_data(train_config(tmp_path, {"train": train, "validation": held_out}, validate_every_steps=1))
    assert list(plain.validation) == [""]
    assert [source for source, _ in plain.kinds.table[::2]] == ["web", "books", None]
    bare = write(tmp_path / "bare", ["web"], sidecars=False)
    named = open_run_data(train_config(tmp_path, {"train": train, "validation": {"books": held_out, "bare": bare}}, validate_every_steps=1))
    assert named.with_parts == {"books": True, "bare": False}
    with pytest.raises(ConfigError, match=r"= 400 sequences, but .*held_out holds 19; lower validation_batches"):
        open_run_data(train_config(tmp_path, {"train": train, "validation": held_out}, validate_every_steps=1, validation_batches=200))


def other_tokenizer(manifest: dict[str, Any]) -> None:
    manifest["details"]["tokenizer_fingerprint"] = "another"


def test_what_cannot_be_read_as_the_config_says_is_refused_before_the_start(tmp_path: Path) -> None:
    first, second = write(tmp_path / "first", ["web"]), write(tmp_path / "second", ["books"])

    def refused(error: type[TptError], says: str, data: dict[str, Any]) -> None:
        with pytest.raises(error, match=says):
            open_run_data(train_config(tmp_path, data))

    refused(ConfigError, "first: the run would go through it 0.21 times, over its max_epochs=0.2", {"train": [{"path": first, "max_epochs": 0.2}]})
    edit_manifest(tmp_path / "second", other_tokenizer)
    refused(DataError, "second was made with another tokenizer than .*first", {"train": [{"path": path, "weight": 1} for path in (first, second)]})
    np.full(10, 3, np.uint16).tofile(tmp_path / "first.sources.bin")
    refused(DataError, r"first.sources.bin: numbers of sources beyond the 1 that the manifest names", {"train": first})
