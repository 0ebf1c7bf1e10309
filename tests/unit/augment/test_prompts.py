from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tpt_megatron.augment.excerpt import Excerpt
from tpt_megatron.augment.prompts import Prompt, builtin_prompts, choose_focus, load_prompts
from tpt_megatron.errors import ConfigError, RecordError
from tpt_megatron.records import Document

FIELDS = {"question": "question", "answer": "answer"}
TEXT = "The first sentence stands here. The second one is not much longer! Is the third one a question? Short. 这是第一个中文句子，也是唯一的一个长一点的句子。"


def load(tmp_path: Path, template: str, fields: dict[str, str] | None = None) -> Prompt:
    (tmp_path / "mine.jinja").write_text(template, encoding="utf-8")
    return load_prompts((str(tmp_path / "mine.jinja"),), FIELDS if fields is None else fields)[0]


def render(prompt: Prompt, text: str = TEXT, before: str = "", seed: int = 0, fields: dict[str, str] = FIELDS, **extra: Any) -> list[tuple[str, str]]:
    messages = prompt.render(Document("d1", text, None, extra), Excerpt(text, 0, len(text), before), fields, seed, "in.jsonl:7")
    return [(message["role"], message["content"]) for message in messages]


def test_the_expert_prompt_is_context_then_its_end_then_the_instruction() -> None:
    (prompt,) = load_prompts(("expert",), FIELDS)
    ((role, content),) = render(prompt)
    assert role == "user"
    assert content.startswith(f"{TEXT}\n\n## End of the context\n\n")
    assert "Feynman technique" in content.partition("## End of the context")[2]
    assert prompt.variables == {"document", "before"}


def test_what_precedes_a_chunk_stands_before_it() -> None:
    for prompt in load_prompts(("expert", "focus"), FIELDS):
        ((_, content),) = render(prompt, before="Earlier text.")
        assert content.index("Earlier text.") < content.index("## The context") < content.index(TEXT) < content.index("## End of the context")


def test_the_focus_prompt_quotes_a_sentence_after_the_context() -> None:
    (prompt,) = load_prompts(("focus",), FIELDS)
    ((_, content),) = render(prompt, seed=3)
    assert choose_focus(TEXT, 3) in content.partition("## End of the context")[2]


def test_back_thinking_has_question_and_answer_and_needs_both() -> None:
    (prompt,) = load_prompts(("back_thinking",), FIELDS)
    ((_, content),) = render(prompt, question="Why is it so?", answer="Because {{ it }} is.")
    assert content.index("Why is it so?") < content.index("Because {{ it }} is.") < content.index("## End of the answer")
    with pytest.raises(RecordError, match=r"in\.jsonl:7: field 'answer' is missing, which prompt back_thinking uses; the record has: id, text, question"):
        render(prompt, question="Why?")
    with pytest.raises(RecordError, match=r"field 'answer' must be a string.*found int"):
        render(prompt, question="Why?", answer=42)
    with pytest.raises(RecordError, match="field 'question' is empty"):
        render(prompt, question="  ", answer="x")
    with pytest.raises(RecordError, match="field 'answer' is missing"):
        render(prompt, question="Why?", answer=None)


def test_every_prompt_of_the_package_loads_and_differs() -> None:
    prompts = load_prompts(tuple(builtin_prompts()), FIELDS)
    assert [prompt.name for prompt in prompts] == ["back_thinking", "expert", "focus"]
    assert len({prompt.hash for prompt in prompts}) == 3


def test_a_file_is_named_by_its_stem_and_hashed_by_its_text(tmp_path: Path) -> None:
    prompt = load(tmp_path, "Think: {{ document }}\n")
    assert (prompt.name, prompt.hash) == ("mine", hashlib.sha256(b"Think: {{ document }}\n").hexdigest()[:16])
    assert render(prompt) == [("user", f"Think: {TEXT}")]


def test_a_documents_braces_tags_and_markup_are_text(tmp_path: Path) -> None:
    text = "{{ document }} {% if %} {# no #} <b>&amp;</b> 'x'"
    assert render(load(tmp_path, "{{ document }}|{{ record.text }}"), text) == [("user", f"{text}|{text}")]


def test_the_block_system_is_a_message_of_its_own(tmp_path: Path) -> None:
    prompt = load(tmp_path, "{% block system %}\nYou are {{ record.who }}.\n{% endblock %}\n\n{{ document }}\n")
    assert render(prompt, who="an expert") == [("system", "You are an expert."), ("user", TEXT)]
    assert prompt.variables == {"document", "record"}
    assert render(load(tmp_path, "{% block system %}{% if before %}x{% endif %}{% endblock %}{{ document }}")) == [("user", TEXT)]


def test_records_and_prompt_fields_fill_variables(tmp_path: Path) -> None:
    prompt = load(
        tmp_path, "{{ title }}/{{ record.items }}/{{ record.meta.n }}/{% if record.no is defined %}x{% endif %}", {"title": "headline", "unused": "absent"}
    )
    assert render(prompt, fields={"title": "headline", "unused": "absent"}, headline="H", items="I", meta={"n": 3}, no=None) == [("user", "H/I/3/")]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ document }}\n\n{{ documnt }}", r"mine\.jinja:3: unknown variable 'documnt'; allowed are answer, before, document, focus, question, record"),
        ("{% block system %}\n{{ nobody }}{% endblock %}{{ document }}", r"mine\.jinja:2: unknown variable 'nobody'"),
        ("{{ document }}\n{% if %}", r"mine\.jinja:2: "),
        ("{{ document }}\n{{ document", r"mine\.jinja:2: "),
        ("\n{{ document | nofilter }}", r"mine\.jinja:2: .*nofilter"),
        ("{{ record.choices | random }}", r"mine\.jinja:1: .*random"),
        ("{{ lipsum() }}", "unknown variable 'lipsum'"),
        ("{{ document }}\n{% include 'other.jinja' %}", r"mine\.jinja:2: a prompt is one file"),
        ("{% block user %}{{ document }}{% endblock %}", r"mine\.jinja:1: block 'user'"),
        ("{% if before %}{% block system %}x{% endblock %}{% endif %}", r"mine\.jinja:1: block 'system'.*within nothing else"),
        (" \n", r"mine\.jinja: an empty template"),
    ],
)
def test_a_mistake_in_a_template_is_found_when_it_is_loaded(tmp_path: Path, template: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, template)


def test_what_a_record_lacks_is_the_records_fault_and_what_the_sandbox_forbids_the_templates(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"in\.jsonl:7: prompt mine cannot be filled: .*'nothing'; the record has: id, text, x"):
        render(load(tmp_path, "{{ record.nothing }}"), x=1)
    with pytest.raises(RecordError, match=r"in\.jsonl:7: prompt mine cannot be filled"):
        render(load(tmp_path, "{{ record.x + 1 }}"), x="one")
    with pytest.raises(RecordError, match="gives an empty message"):
        render(load(tmp_path, "{{ before }}"))
    with pytest.raises(ConfigError, match="not allowed in a template"):
        render(load(tmp_path, "{{ record.__class__.__mro__ }}"))
    with pytest.raises(ConfigError, match="not allowed in a template"):
        render(load(tmp_path, "{{ record.x.append(1) }}"), x=[])


def test_names_that_mean_two_things_or_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.jinja: no such file, and no prompt of that name \(back_thinking, expert, focus\)"):
        load_prompts(("nowhere.jinja",), {})
    (tmp_path / "expert.txt").write_text("{{ document }}")
    with pytest.raises(ConfigError, match="a second prompt called 'expert'"):
        load_prompts(("expert", str(tmp_path / "expert.txt")), {})
    with pytest.raises(ConfigError, match="'document' cannot name a variable: it is taken"):
        load_prompts(("expert",), {"document": "x"})
    with pytest.raises(ConfigError, match="'a b' cannot name a variable: it is no identifier"):
        load_prompts(("expert",), {"a b": "x"})
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ConfigError, match=r"latin\.txt: not valid UTF-8 at byte 3"):
        load_prompts((str(tmp_path / "latin.txt"),), {})


def test_the_focus_is_one_of_the_longer_sentences_the_same_for_the_same_seed() -> None:
    chosen = [choose_focus(TEXT, seed) for seed in range(200)]
    assert chosen == [choose_focus(TEXT, seed) for seed in range(200)]
    assert set(chosen) == {
        "The first sentence stands here.",
        "The second one is not much longer!",
        "Is the third one a question?",
        "这是第一个中文句子，也是唯一的一个长一点的句子。",
    }
    assert choose_focus("Tiny.", 5) == "Tiny."
    long = choose_focus("many words in a row " * 100, 1)
    assert 350 < len(long) <= 400
    assert long.endswith(("many", "words", "in", "a", "row"))


def test_the_module_loads_without_jinja() -> None:
    program = (
        "import sys; sys.modules['jinja2'] = None; import tpt_megatron.augment.prompts as prompts\n"
        "try: prompts.load_prompts(('expert',), {})\n"
        "except prompts.MachineError as error: print(error)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "tpt-megatron[generate]" in ended.stdout
