"""Chats become sequences whose tokens are prompt or the assistant's: by the template, and as Hugging Face's own rendering has it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from tests.support.chats import BLOCKS, FORGETFUL, LLAMA_3, PLAIN, chat, write_chats, write_tokenizer
from tpt_megatron.config.load import check_config
from tpt_megatron.config.preprocess import PreprocessConfig
from tpt_megatron.datasets import PART_ASSISTANT, PART_PROMPT, open_dataset
from tpt_megatron.errors import ConfigError, RecordError, TptError
from tpt_megatron.inspection.show import inspect_path
from tpt_megatron.preprocess.chat import ChatReader
from tpt_megatron.preprocess.runner import merge, run_preprocess
from tpt_megatron.preprocess.templates import CHATML, load_template
from tpt_megatron.records import FieldNames
from tpt_megatron.tokenizer import END_OF_DOCUMENT, load_tokenizer

TWO_TURNS = chat("Hi there", "<think>\nhm\n</think>\n\nhello", "And now?", "bye", system="Be short")


def reader(folder: Path, template: str = "tokenizer", source: str | None = None, **changes: Any) -> ChatReader:
    tokenizer = load_tokenizer(str(write_tokenizer(folder, source)), changes.pop("end_of_document", END_OF_DOCUMENT))
    loaded = load_template(template, str(folder), changes.get("variables", {}), changes.get("learn", "all"))
    return ChatReader(loaded, tokenizer, FieldNames(), "messages")


def learned(read: ChatReader, messages: list[dict[str, str]]) -> tuple[list[str], str, int]:
    """Return the assistant's segments, the whole text, and the part of the end-of-document token."""
    found = read.read({"messages": messages}, "f:1")
    return [text for part, text in found.segments if part == PART_ASSISTANT], "".join(text for _, text in found.segments), found.end


def test_chatml_marks_each_reply_with_its_end_of_turn_token(tmp_path: Path) -> None:
    turns, text, end = learned(reader(tmp_path, "chatml"), TWO_TURNS)
    assert turns == ["<think>\nhm\n</think>\n\nhello<|im_end|>", "bye<|im_end|>"]
    assert text.startswith("<|im_start|>system\nBe short<|im_end|>\n<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n<think>")
    assert text.endswith("bye<|im_end|>\n")
    assert end == PART_PROMPT  # the turn has an end of its own
    assert learned(reader(tmp_path, "chatml", learn="last"), TWO_TURNS)[0] == ["bye<|im_end|>"]
    assert learned(reader(tmp_path, "chatml"), [*chat("a", "b"), {"role": "user", "content": "c"}])[0] == ["b<|im_end|>"]


def test_llama_3s_kind_trims_has_one_bos_and_no_date_of_today(tmp_path: Path) -> None:
    turns, text, _ = learned(reader(tmp_path, source=LLAMA_3), chat(" q ", " a\n", system="s"))
    assert turns == ["a<|eot_id|>"]
    assert text == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday: 26 Jul 2024\ns<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nq<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\na<|eot_id|>"
    )
    with pytest.raises(RecordError, match="cannot write these messages: role tool is unknown"):
        learned(reader(tmp_path, source=LLAMA_3), [{"role": "tool", "content": "x"}, *chat("q", "a")])


def test_generation_blocks_say_what_is_learned(tmp_path: Path) -> None:
    turns, text, end = learned(reader(tmp_path, source=BLOCKS), TWO_TURNS)
    assert (turns, end) == (["<think>\nhm\n</think>\n\nhello<|im_end|>", "bye<|im_end|>"], PART_PROMPT)
    assert text == learned(reader(tmp_path, "chatml"), TWO_TURNS)[1]
    assert learned(reader(tmp_path, source=BLOCKS, learn="last"), TWO_TURNS)[0] == ["bye<|im_end|>"]


def test_a_template_that_forgets_thinking_is_not_marked_wrongly(tmp_path: Path) -> None:
    read = reader(tmp_path, source=FORGETFUL)
    assert learned(read, chat("q", "<think>t</think>a"))[0] == ["<think>t</think>a<|im_end|>"]
    assert learned(read, chat("q", "a", "r", "<think>t</think>b"))[0] == ["a<|im_end|>", "<think>t</think>b<|im_end|>"]
    with pytest.raises(RecordError, match=r"f:1: chat.template=tokenizer: its text of the messages up to message 3 is not how .* or set chat.learn=last"):
        read.read({"messages": TWO_TURNS}, "f:1")
    assert learned(reader(tmp_path, source=FORGETFUL, learn="last"), TWO_TURNS)[0] == ["bye<|im_end|>"]


def test_the_end_of_document_is_learned_where_nothing_else_ends_a_turn(tmp_path: Path) -> None:
    turns, text, end = learned(reader(tmp_path, source=PLAIN), chat("q", "a"))
    assert (turns, text, end) == ([" a\n"], "user: q\nassistant: a\n", PART_ASSISTANT)
    assert learned(reader(tmp_path, source=PLAIN), [*chat("q", "a"), {"role": "user", "content": "r"}])[2] == PART_PROMPT
    # ... or where it is itself the end of a turn: then it does not come twice.
    turns, text, end = learned(reader(tmp_path, "chatml", end_of_document="<|im_end|>"), chat("q", "a", "r", "b"))
    assert turns == ["a<|im_end|>", "b"]
    assert text.endswith("<|im_start|>assistant\nb") and end == PART_ASSISTANT


@pytest.mark.parametrize("source", [CHATML, LLAMA_3, BLOCKS, PLAIN])
def test_texts_tokens_and_masks_are_hugging_faces_own(tmp_path: Path, source: str) -> None:
    transformers = pytest.importorskip("transformers")
    read = reader(tmp_path, source=source)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    chats = [TWO_TURNS, chat("é😀 " * 20, "naïve <|im_end|> text", "x\n", "\n\n y")]
    for messages in chats:
        text = theirs.apply_chat_template(messages, tokenize=False)
        date = "Today: " + text.split("Today: ")[1].split("\n")[0] if "Today: " in text else ""
        assert learned(read, messages)[1] == (text.replace(date, "Today: 26 Jul 2024") if date else text)
    write_chats(tmp_path / "in.jsonl", chats)
    run_preprocess(config(tmp_path, tokenizer=str(tmp_path), chat={"template": "tokenizer"}))
    dataset = open_dataset(tmp_path / "out/chat/train")
    for number, messages in enumerate(chats):
        tokens, parts = (of[dataset.offsets[number] : dataset.offsets[number + 1] - 1].tolist() for of in (dataset.tokens, dataset.parts))
        assert theirs.decode(tokens) == learned(read, messages)[1]
        if source != LLAMA_3:  # whose text has the day in it
            found = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=source == BLOCKS)
            assert tokens == found["input_ids"]
            if source == BLOCKS:
                assert [part == PART_ASSISTANT for part in parts] == [bool(mask) for mask in found["assistant_masks"]]


def config(folder: Path, **changes: Any) -> PreprocessConfig:
    values = {"input": str(folder / "in.jsonl"), "output": str(folder / "out"), "tokenizer": str(folder), "arms": ["chat"], "chat": {"template": "chatml"}}
    return check_config(PreprocessConfig, values | changes, "config.yaml")


def test_a_dataset_of_chats_marks_its_tokens_counts_them_and_verifies(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, adds_bos=True)
    write_chats(tmp_path / "in.jsonl", [TWO_TURNS, chat("one two", "three")])
    manifest = run_preprocess(config(tmp_path))["chat/train"]
    prefix = tmp_path / "out/chat/train"
    dataset, tokenizer = open_dataset(prefix), load_tokenizer(str(tmp_path), END_OF_DOCUMENT)
    assert dataset.parts is not None
    tokens, parts = dataset.tokens[dataset.offsets[1] :], dataset.parts[dataset.offsets[1] :]
    assert tokenizer.decode(tokens[parts == PART_ASSISTANT].tolist()) == "three<|im_end|>"
    assert tokenizer.decode(tokens.tolist()) == "<|im_start|>user\none two<|im_end|>\n<|im_start|>assistant\nthree<|im_end|>\n<|endoftext|>"
    assert [int(token) for token in tokens if token < 7] == [1, 2, 1, 2, 0]  # special tokens, each one token; no BOS, which the template does not write
    rows = pq.read_table(f"{prefix}.documents.parquet").to_pylist()
    assert list(rows[1]) == ["id", "sample", "source", "generator", "tokens_prompt", "tokens_assistant", "offset"]
    assert (rows[1]["id"], rows[1]["tokens_assistant"], rows[1]["offset"]) == ("c1", (parts == PART_ASSISTANT).sum(), dataset.offsets[1])
    counts = manifest.counts
    assert counts["tokens"] == counts["tokens_prompt"] + counts["tokens_assistant"] == len(dataset.tokens)
    assert "tokens_document" not in counts
    assert manifest.settings["chat"]["template"] == CHATML

    out = io.StringIO()
    console = Console(file=out, width=160)
    inspect_path(prefix, console, documents=2, plot=None, check=False)
    inspect_path(prefix.parent.parent, console, documents=0, plot=None, check=False)
    inspect_path(prefix, console, documents=0, plot=None, check=True)
    inspect_path(prefix, console, documents=0, plot=tmp_path / "plot.png", check=False)
    said = out.getvalue()
    assert "assistant\n⟦three<|im_end|>⟧\n<|endoftext|>" in said and "first documents: prompt  ⟦assistant⟧" in said
    assert f"{counts['tokens_assistant']:,} ({counts['tokens_assistant'] / counts['tokens']:.1%})" in said
    assert "finding" not in said
    damaged = np.array(dataset.parts)
    damaged[3] = 1
    damaged.tofile(f"{prefix}.parts.bin")
    with pytest.raises(TptError, match="finding"):
        inspect_path(prefix, console, documents=0, plot=None, check=True)
    assert "1 tokens are of no known part, the first at token 3 of sequence 0" in out.getvalue()


BAD: dict[str, tuple[Any, str]] = {
    "no messages": ({"text": "x"}, "field 'messages' is missing"),
    "empty": ({"messages": []}, "field 'messages' must be a list of messages, and is empty"),
    "a text": ({"messages": "hi"}, "field 'messages' must be a list of messages, found str"),
    "a message": ({"messages": ["hi"]}, "message 1 must be a JSON object with role and content, found str"),
    "no content": ({"messages": [{"role": "user"}]}, "'content' of message 1 must be a string, and is missing"),
    "parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}, "'content' of message 1 must be a string, found list"),
    "no role": ({"messages": [{"from": "human", "content": "x"}]}, "'role' of message 1 must be a string, and is missing"),
    "no assistant": ({"messages": [{"role": "user", "content": "x"}]}, "no message is the assistant's: there is nothing to learn"),
    "end of document": ({"messages": chat("a <|endoftext|> b", "c")}, "message 1 spells '<|endoftext|>', which ends the document"),
    "surrogate": ({"messages": chat("a", "\ud800")}, "not valid JSON"),
    "no character": ({"messages": chat("a", "b\ufdd0c")}, "field 'messages' holds a code point that is no character"),
    "list": ([1], "a record must be a JSON object"),
    "id": ({"id": [1], "messages": chat("a", "b")}, "field 'id' must be a string, found list"),
}


def test_bad_records_are_set_aside_with_a_reason_each(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    lines = [json.dumps(record) for record, _ in BAD.values()] + ['{"messages": [{"role": "user", "role": "assistant", "content": "x"}]}']
    (tmp_path / "in.jsonl").write_text("\n".join([*lines, json.dumps({"messages": chat("a", "b")})]))
    counts = run_preprocess(config(tmp_path))["chat/train"].counts
    assert (counts["records"], counts["bad_records"], counts["sequences"]) == (1, len(lines), 1)
    aside = [json.loads(line) for line in (tmp_path / "out/bad_records.jsonl").read_text().splitlines()]
    for number, (bad, reason) in enumerate(zip(aside, [*(reason for _, reason in BAD.values()), "the key 'role' stands twice in one object"], strict=True), 1):
        assert bad["where"].endswith(f"in.jsonl:{number}")
        assert reason in bad["reason"], bad
    with pytest.raises(RecordError, match=r"in\.jsonl:1: field 'messages' is missing"):
        run_preprocess(config(tmp_path, output=str(tmp_path / "other"), on_bad_record="fail"))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "chat").iterdir()}


def test_splits_duplicates_workers_shards_and_parquet_are_as_for_documents(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    chats = [chat(f"question {i % 40}", f"answer {i % 40} " * (i % 7 + 1)) for i in range(80)]
    chats[41:] = chats[1:40]  # one chat after the other again
    write_chats(tmp_path / "in.jsonl", chats)
    settings: dict[str, Any] = {"deduplicate": "exact", "validation_fraction": 0.3, "piece_megabytes": 0.002}
    manifests = run_preprocess(config(tmp_path, **settings))
    counts = [manifests[f"chat/{split}"].counts for split in ("train", "validation")]
    assert counts[0]["duplicates"] == 39 and sum(count["documents"] for count in counts) == 41
    assert all(count["documents"] for count in counts)
    made = files_of(tmp_path / "out")
    assert run_preprocess(config(tmp_path, **settings)) == manifests  # finished before
    run_preprocess(config(tmp_path, **settings, output=str(tmp_path / "two"), workers=2))
    assert files_of(tmp_path / "two") == made
    for number in (2, 1):
        run_preprocess(config(tmp_path, **settings, output=str(tmp_path / "parts"), shard=f"{number}/2"))
    merge(tmp_path / "parts", [])
    assert files_of(tmp_path / "parts") == made
    # The split is the messages', not the template's.
    other = run_preprocess(config(tmp_path, **settings, output=str(tmp_path / "other"), chat={"template": str(written(tmp_path / "t.jinja", PLAIN))}))
    assert [other[name].counts["documents"] for name in manifests] == [manifest.counts["documents"] for manifest in manifests.values()]
    table = pa.Table.from_pylist([{"id": f"c{i}", "source": f"s{i % 2}", "messages": messages} for i, messages in enumerate(chats)])
    pq.write_table(table, tmp_path / "in.parquet")
    run_preprocess(config(tmp_path, **settings, input=str(tmp_path / "in.parquet"), output=str(tmp_path / "parquet")))
    assert files_of(tmp_path / "parquet")["train.bin"] == made["train.bin"]
    with pytest.raises(ConfigError, match="made from other settings"):
        run_preprocess(config(tmp_path, **settings, chat={"template": "chatml", "learn": "last"}))


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "other arms": ({"arms": ["chat", "vanilla"]}, r"arms=\['chat', 'vanilla'\]: chat reads chats, and the other arms read documents"),
    "samples": ({"thoughts": "samples"}, "thoughts=samples is for arms of documents"),
    "near": ({"deduplicate": "near"}, "deduplicate=near compares documents; with arms=.'chat'. give exact or none"),
    "delimiters": ({"delimiters": {"open": "<t>"}}, "delimiters={'open': '<t>'} are for thoughts"),
    "chat without its arm": ({"arms": ["vanilla"]}, r"chat={'template': 'chatml'} is for arms=\['chat'\], not for arms=\['vanilla'\]"),
    "no template": ({"chat": {}}, "chat.template=tokenizer: .* brings no chat_template .*; give chat.template=chatml, or a file"),
    "no file": ({"chat": {"template": "nowhere.jinja"}}, "chat.template=nowhere.jinja: no such file; give chatml, tokenizer, or the path"),
    "no such tokens": ({"tokenizer": "byte"}, r"chat.template=chatml writes <\|im_start\|>, <\|im_end\|>, which the tokenizer byte has no tokens for"),
    "unknown key": ({"chat": {"tmplate": "chatml"}}, "unknown key 'chat.tmplate'; allowed here: learn, template, variables"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_before_any_work(tmp_path: Path, case: str) -> None:
    changes, says = REFUSED[case]
    write_tokenizer(tmp_path)
    write_chats(tmp_path / "in.jsonl", [chat("a", "b")])
    with pytest.raises(ConfigError, match=says):
        run_preprocess(config(tmp_path, **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{% for message in messages %}", "line 1 is no Jinja that chat templates are written in"),
        ("{{ strftime_now('%d') }}", "cannot write these messages: 'strftime_now' is undefined .tried on one user's and one assistant's message"),
        ("{{ messages.append(1) }}", "cannot write these messages: access to attribute 'append' of 'list' object is unsafe"),
        ("{{ ''.__class__.__mro__ }}", "cannot write these messages: access to attribute '__class__' of 'str' object is unsafe"),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}{{ messages | length }}",
            "its text of the messages up to message 2 is not how its text of the whole chat begins .* put {% generation %} around it .tried on",
        ),
        ("{% for m in messages %}{% generation %}{% endgeneration %}{% endfor %}", "marks nothing of it as the assistant's"),
    ],
)
def test_templates_that_fail_or_reach_out_are_refused(tmp_path: Path, source: str, says: str) -> None:
    write_tokenizer(tmp_path)
    write_chats(tmp_path / "in.jsonl", [chat("a", "b")])
    with pytest.raises(ConfigError, match=says):
        run_preprocess(config(tmp_path, chat={"template": str(written(tmp_path / "t.jinja", source))}))


def test_templates_have_the_filters_loops_and_variables_that_hugging_face_gives(tmp_path: Path) -> None:
    source = (
        "{% for message in messages %}\n    {% if loop.index0 > 1 %}\n        {% break %}\n    {% endif %}\n"
        "{{ message.role }} {{ message.content }} {{ {'ä': '<b>'} | tojson }} {{ mood }} {{ eos_token }}\n{% endfor %}"
    )
    tokenizer = load_tokenizer(str(write_tokenizer(tmp_path)), END_OF_DOCUMENT)
    template = load_template(str(written(tmp_path / "t.jinja", source)), str(tmp_path), {"mood": "glad"}, "all")
    assert template.render(chat("q", "a", "r")) == 'user q {"ä": "<b>"} glad <|im_end|>\nassistant a {"ä": "<b>"} glad <|im_end|>\n'
    assert tokenizer.added_token_id("<|im_end|>") == 2


def test_the_folder_s_template_file_comes_before_its_config(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "t", BLOCKS)
    assert load_template("tokenizer", str(folder / "tokenizer.json"), {}, "all").source == BLOCKS
    written(folder / "chat_template.jinja", LLAMA_3)
    assert load_template("tokenizer", str(folder), {}, "all").source == LLAMA_3
    described = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "chat_template.jinja").unlink()
    described["chat_template"] = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": PLAIN}]
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    assert load_template("tokenizer", str(folder), {}, "all").source == PLAIN


def test_a_tokenizer_that_puts_a_space_before_every_text_is_refused(tmp_path: Path) -> None:
    def prepend(definition: dict[str, Any]) -> None:
        definition["pre_tokenizer"]["add_prefix_space"] = True

    edit(write_tokenizer(tmp_path) / "tokenizer.json", prepend)
    write_chats(tmp_path / "in.jsonl", [chat("a", "b")])
    with pytest.raises(ConfigError, match="it puts a space before every text, so that a turn by itself has other tokens than in its chat"):
        run_preprocess(config(tmp_path))


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
