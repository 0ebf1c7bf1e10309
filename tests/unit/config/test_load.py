from __future__ import annotations

import re
from pathlib import Path

import pytest

from tpt_megatron.config.augment import AugmentConfig, FieldGenerator, WorkedGenerator
from tpt_megatron.config.load import load_config, read_values
from tpt_megatron.config.preprocess import PreprocessConfig
from tpt_megatron.config.train import TrainConfig
from tpt_megatron.errors import ConfigError

GOOD = "input: a.jsonl\noutput: out\ngenerator: {kind: field, field: thought}\n"


def load(tmp_path: Path, text: str, *overrides: str) -> AugmentConfig:
    path = tmp_path / "augment.yaml"
    path.write_text(text)
    return load_config(AugmentConfig, str(path), overrides)


def test_one_string_is_a_list_of_one_and_defaults_are_filled_in(tmp_path: Path) -> None:
    config = load(tmp_path, GOOD)
    assert config.input == ("a.jsonl",)
    assert config.generator == (FieldGenerator(kind="field", field="thought"),)
    assert config.on_bad_record == "set_aside"


def test_overrides_are_yaml_with_dotted_names_and_the_last_wins(tmp_path: Path) -> None:
    config = load(tmp_path, GOOD, "input=[b.jsonl, c.jsonl]", "fields.text=x", "fields.text=content", "generator={kind: worked}")
    assert config.input == ("b.jsonl", "c.jsonl")
    assert config.fields.text == "content"
    assert config.generator == (WorkedGenerator(kind="worked"),)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (GOOD + "inptu: 3\n", (), "unknown key 'inptu'; allowed here: checks, chunks, "),
        (GOOD, ("fields.txt=a",), "unknown key 'fields.txt'; allowed here: id, source, text"),
        (GOOD, ("generator.fild=a",), "unknown key 'generator.0.field.fild'; allowed here: field, kind"),
        ("input: a\ngenerator: {kind: worked}\n", (), "key 'output' is missing"),
        (GOOD, ("on_bad_record=ignore",), "on_bad_record='ignore': must be 'set_aside' or 'fail'"),
        (GOOD, ("generator.kind=magic",), "generator.0.kind='magic': must be one of 'field', 'worked', 'openai', "),
        (GOOD, ("generator={field: thought}",), "key 'generator.0.kind' is missing"),
        (GOOD, ("generator=[]",), "generator=[]: expected at least 1 of them"),
        (GOOD, ("prompts=3",), "prompts=3: expected a list"),
        (GOOD, ("slurm=3",), "slurm=3: expected a group of keys"),
        (GOOD, ("cost=[1]",), "cost=[1]: expected a group of keys"),
        (GOOD, ("shard.documents=many",), "shard.documents='many': expected a whole number"),
        (GOOD, ("shard.documents=1.5",), "shard.documents=1.5: expected a whole number"),
        (GOOD, ("shard.documents=",), "shard.documents=null: expected a whole number"),
        (GOOD, ("shard.documents=0",), "shard.documents=0: must be greater than or equal to 1"),
        (GOOD, ("shard.megabytes=true or so",), "shard.megabytes='true or so': expected a number"),
        (GOOD, ("keep_rejected=maybe",), "keep_rejected='maybe': expected true or false"),
        (GOOD, ("output=true",), "output=true: expected text, in quotes"),
        (GOOD, ("slurm={tasks: 1, partition: p, time: '1', logs: 3}",), "slurm.logs=3: expected a path"),
        ("a: [\n", (), "augment.yaml:2: not valid YAML"),
        ("- a\n", (), "found a list"),
        ("", (), "augment.yaml: the file has no keys"),
        ("# nothing\n", (), "augment.yaml: the file has no keys"),
        ("input: a\noutput: b\ninput: c\n", (), "augment.yaml:3: not valid YAML: the key 'input' stands here a second time"),
        ("input: a\ngenerator: {kind: worked, kind: replay}\n", (), "augment.yaml:2: not valid YAML: the key 'kind' stands here a second time"),
        (GOOD, ("output",), "not of the form key=value"),
        (GOOD, ("input.a=3",), "input is a value, not a group of keys"),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(tmp_path: Path, text: str, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_keys_that_are_allowed_are_listed_once_for_each_place(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, GOOD, "nods=1", "fields.txt=a", "fields.name=b", "foo=2", "shard.documents=0")
    said = [re.sub(r"^.*augment\.yaml: ", "", line) for line in str(caught.value).split(f"; {tmp_path}")]
    assert said[0] == "unknown keys 'fields.txt', 'fields.name'; allowed here: id, source, text"
    assert said[1].startswith("unknown keys 'nods', 'foo'; allowed here: checks, chunks, ")
    assert said[2:] == ["shard.documents=0: must be greater than or equal to 1"]


def test_a_missing_file_and_bad_encoding_are_config_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such config file"):
        load_config(AugmentConfig, str(tmp_path / "none.yaml"))
    with pytest.raises(ConfigError, match=": a folder, and no config file"):
        load_config(AugmentConfig, str(tmp_path))
    with pytest.raises(ConfigError, match="the config's name is empty; give a YAML file or a recipe"):
        load_config(AugmentConfig, "")
    (tmp_path / "latin.yaml").write_bytes(b"input: \xe9\n")
    with pytest.raises(ConfigError, match="not valid UTF-8 at byte 7"):
        load_config(AugmentConfig, str(tmp_path / "latin.yaml"))


@pytest.mark.parametrize("override", ["arms=[]", "arms=[vanilla, vanilla]", "validation_fraction=1.0", "validation_fraction=.nan", "arms=[sideways]"])
def test_impossible_preprocess_settings_are_refused(tmp_path: Path, override: str) -> None:
    path = tmp_path / "preprocess.yaml"
    path.write_text("input: a\noutput: b\ntokenizer: byte\n")
    assert load_config(PreprocessConfig, str(path)).arms == ("vanilla", "append")
    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        load_config(PreprocessConfig, str(path), [override])


def test_a_preset_is_among_the_keys_that_a_model_may_have(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text("model: {num_heds: 4}\n")
    with pytest.raises(ConfigError, match=r"unknown key 'model\.num_heds'; allowed here: .*\bpreset\b"):
        load_config(TrainConfig, str(tmp_path / "train.yaml"))


def test_yaml_may_merge_keys_that_it_also_gives(tmp_path: Path) -> None:
    (tmp_path / "any.yaml").write_text("shared: &shared {x: 1, y: 2}\nmine: {<<: *shared, y: 3}\n")
    values, _ = read_values(str(tmp_path / "any.yaml"))
    assert values["mine"] == {"x": 1, "y": 3}
