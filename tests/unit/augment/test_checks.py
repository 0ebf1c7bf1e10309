from __future__ import annotations

import json
import os
import pydoc_data.topics
import subprocess
import sys
from pathlib import Path

import pytest

from tpt_megatron.augment.checks import REASONS, LanguageCheck, ThoughtChecks, find_copy, find_loop, is_prose, looping_tail, units_of
from tpt_megatron.augment.contamination import ContaminationIndex
from tpt_megatron.config.augment import Checks, Contamination
from tpt_megatron.errors import ConfigError

GSM8K = Path(__file__).parents[3].parent / "shared" / "data" / "gsm8k" / "train.jsonl"
TOPICS = pydoc_data.topics.topics
PROSE = TOPICS["execmodel"]
OTHER_PROSE = TOPICS["types"]
GERMAN = (
    "Zuerst sollten wir uns fragen, was der Verfasser mit diesem Absatz eigentlich sagen will. Er behauptet, dass Pflanzen das Licht der Sonne "
    "nutzen, um aus Wasser und Luft ihre Nahrung herzustellen, und er erklärt anschließend, warum sie dafür grüne Blätter brauchen. Das ist "
    "richtig, aber er lässt aus, was in der Nacht geschieht: Auch dann atmen Pflanzen, und sie verbrauchen einen Teil dessen, was sie gebildet haben."
)
CHINESE = "我们首先要弄清楚这段文字到底想说明什么。作者认为植物利用阳光把水和空气变成自己的养分，并且解释了为什么它们需要绿色的叶子。" * 4
ENGLISH = (
    "First we should ask what the author wants to say in this paragraph. It claims that plants use the light of the sun to make their food out of "
    "water and air, and goes on to explain why they need green leaves for it. That is right, but it leaves out what happens at night: plants "
    "breathe then too, and they use up a part of what they made during the day, which is why a closed room full of them is no cleaner at dawn."
)


def loop(text: str, max_repeated: float = 0.5) -> str | None:
    return find_loop(text, units_of(text.split()), max_repeated)


def copy(text: str, document: str, max_copied: float = 0.5) -> str | None:
    return find_copy(text.split(), units_of(text.split()), document, max_copied)


def check(text: str, document: str = PROSE, *, closed: bool = True, refused: bool = False, **settings: object) -> tuple[str, str] | None:
    return ThoughtChecks(Checks.model_validate(settings), None).check(text, document, closed, refused)


def reason(text: str, document: str = PROSE, *, closed: bool = True, refused: bool = False, **settings: object) -> str | None:
    found = check(text, document, closed=closed, refused=refused, **settings)
    return found[0] if found else None


LOOPS = {
    "sentence": "Wait, let me check that again. " * 200,
    "line": "The answer is 42.\n" * 100,
    "two lines in turn": "So x is 3.\nBut then y must be 4, and x cannot be.\n" * 60,
    "one letter": "a" * 3000,
    "word": "no " * 1000,
    "Chinese": "让我再检查一遍这个结果是否正确。" * 50,
    "Chinese with line ends": "让我再检查一遍这个结果是否正确。\n" * 50,
    "Thai": "ลองตรวจสอบอีกครั้ง" * 60,
    "paragraph": ENGLISH * 5,
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_is_found(name: str) -> None:
    assert loop(LOOPS[name]) is not None
    assert loop(LOOPS[name], 0.99) is not None, "by its end alone, or since everything repeats"


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_is_found_at_the_end_of_a_good_start(name: str) -> None:
    start = PROSE[: 2 * len(LOOPS[name])]
    text = f"{start}\n{LOOPS[name][:-5]}"  # the limit cuts it off anywhere
    assert looping_tail(start) is None
    assert looping_tail(text) is not None
    assert "repeat" in (loop(text, 0.99) or "")


def test_the_end_says_what_repeats() -> None:
    characters, period = looping_tail(PROSE[:1000] + "Wait, let me check. " * 50) or (0, 0)
    assert period == 20
    assert 995 <= characters <= 1005
    assert "50 times" in (loop(PROSE[:1000] + " Wait, let me check." * 50, 0.99) or "")


def test_a_unit_that_holds_a_long_text_twice_is_found() -> None:
    same = ENGLISH[:150]
    assert looping_tail(PROSE[:3000] + f" one {same} two {same}" * 12) is not None


def test_an_end_that_repeats_counts_when_it_is_long_enough() -> None:
    unit = "Wait, let me check. "
    assert looping_tail(PROSE[:400] + unit * 14) is None, "280 characters"
    assert looping_tail(PROSE[:400] + unit * 16) is not None
    assert looping_tail(PROSE[:5000] + unit * 90) is None, "1,800 characters, 26 %"
    assert looping_tail(PROSE[:4000] + unit * 90) is not None, "1,800 characters, 31 %"
    assert looping_tail(PROSE[:8000] + unit * 101) is not None, "2,020 characters, 20 %"
    assert looping_tail(PROSE[:500] + ENGLISH * 3) is None
    assert looping_tail(PROSE[:500] + ENGLISH * 4) is not None


HONEST = {
    "table": "| n | square | cube |\n| --- | --- | --- |\n" + "\n".join(f"| {n} | {n**2} | {n**3} |" for n in range(60)),
    "list": "\n".join(f"- step {n}: divide {7 * n} by {n + 1} and keep the rest" for n in range(80)),
    "code": (Path(os.__file__).parent / "textwrap.py").read_text(encoding="utf-8"),
    "more code": (Path(os.__file__).parent / "argparse.py").read_text(encoding="utf-8"),
    "sum": "1 + 1 + 1 + 1 + 1 + 1 + 1 + 1 + 1 + 1 + 1 + 1 = 12",
    "zeros": "The matrix is\n" + "0 0 0 0 0\n" * 5 + "and that is all.\n" + ENGLISH,
    "rule": f"{ENGLISH}\n\n{'-' * 80}\n",
    "Chinese": CHINESE[: len(CHINESE) // 4],
    "said twice": ENGLISH + PROSE[:500] + ENGLISH,
    "digits": "3.14159265358979323846264338327950288419716939937510582097494459230781640628620899862803482534211706798214808651328230664709384460955058223",
}


@pytest.mark.parametrize("name", HONEST)
def test_honest_text_is_no_loop(name: str) -> None:
    assert loop(HONEST[name]) is None


def test_long_prose_is_no_loop() -> None:
    assert [topic for topic, text in TOPICS.items() if loop(text)] == []
    assert loop("\n".join(TOPICS.values())) is None


def test_hardly_any_code_of_the_standard_library_is_a_loop() -> None:
    texts = [path.read_text(encoding="utf-8") for path in sorted(Path(os.__file__).parent.glob("*.py"))]
    pieces = [text[i : i + 8000] for text in texts for i in range(0, len(text), 8000)]
    assert len(pieces) > 500
    assert sum(loop(piece) is not None for piece in pieces) / len(pieces) <= 0.005


def test_no_real_worked_answer_is_rejected() -> None:
    if not GSM8K.is_file():
        assert not os.environ.get("CI"), f"{GSM8K} is missing: CI must run this test"
        pytest.skip(f"needs GSM8K's train.jsonl at {GSM8K}")
    checks = ThoughtChecks(Checks(), None)
    records = [json.loads(line) for line in GSM8K.read_text(encoding="utf-8").splitlines()]
    rejected = [found for record in records if (found := checks.check(record["answer"], record["question"], True, False))]
    assert len(records) == 7473
    assert len(rejected) <= 7
    answers = [record["answer"] for record in records]
    assert [i for i in range(0, 7400, 50) if loop("\n".join(answers[i : i + 50]))] == []


def test_the_limit_of_repetition_is_a_share() -> None:
    words = ENGLISH.split()
    text = " ".join(words + words[:60])  # 60 of its words repeat
    share = 53 / (len(words) + 60 - 7)
    assert loop(text, share + 0.02) is None
    assert (loop(text, share - 0.02) or "").startswith(f"{100 * share:.0f} % of its 8-word runs")


def test_a_copy_is_found_by_its_share() -> None:
    copied = " ".join(PROSE.split()[100:200])
    assert copy(copied, PROSE) == "100 % of its 13-word runs stand in the document"
    assert copy(copied.replace(" ", "\n"), PROSE) is not None
    mixed = f"{copied} {' '.join(OTHER_PROSE.split()[:100])}"
    assert copy(mixed, PROSE, 0.5) is None
    assert copy(mixed, PROSE, 0.4) is not None
    assert copy(" ".join(OTHER_PROSE.split()[:200]), PROSE) is None
    assert copy(copied, "too short") is None


def test_a_chinese_copy_is_found_without_words() -> None:
    text = CHINESE[: len(CHINESE) // 4]
    assert copy(text, f"开头。\n{text[:30]}\n{text[30:]}结尾。") is not None
    assert copy(text, "这里说的是完全不同的事情，与上面的文字没有任何关系。" * 5) is None
    assert copy(text[:25], text) is not None
    assert copy(text[:20], text) is None


def test_a_short_text_is_a_copy_only_as_a_whole_and_from_eight_words_on() -> None:
    words = PROSE.split()
    assert copy(" ".join(words[50:58]), PROSE) is not None
    assert copy(" ".join(words[50:57]), PROSE) is None
    assert copy(" ".join([*words[50:57], "else"]), PROSE) is None
    assert copy(" ".join(words[50:58])[1:], PROSE) is None


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that request.",
        "Hm. I\u2019m sorry but I cannot do it.",
        "I AM UNABLE TO ASSIST with this.",
        "As an AI language model, I cannot say.",
    ],
)
def test_a_refusal_is_found_near_the_start(text: str) -> None:
    assert reason(text) == "refused"
    assert reason(f"{ENGLISH[:200]} {text}") == "refused"
    assert reason(f"{ENGLISH[:300]} {text}") is None
    assert reason(text, refusals=()) is None


def test_the_most_telling_reason_is_given() -> None:
    assert REASONS == ("refused", "empty", "loop", "unclosed", "delimiter", "copy", "contaminated", "language")
    assert check("", closed=False, refused=True) == ("refused", "the engine reports a refusal")
    assert check(" \n", closed=False) == ("empty", "0 characters, fewer than min_characters=1")
    assert reason("short", min_characters=6) == "empty"
    assert reason("shorts", min_characters=6) is None
    assert reason(LOOPS["sentence"], closed=False) == "loop"
    assert reason(LOOPS["sentence"], max_repeated=None) is None
    assert reason(f"{ENGLISH} </think>", closed=False) == "unclosed"
    assert reason(ENGLISH, closed=False, unclosed="retry") == "unclosed"
    assert reason(ENGLISH, closed=False, unclosed="keep") is None
    assert check(f"{PROSE} </think>") == ("delimiter", "contains '</think>'")
    assert reason(f"{ENGLISH} </think>", delimiters=()) is None
    assert reason(PROSE) == "copy"
    assert reason(PROSE, max_copied=None) is None
    assert reason(ENGLISH) is None


def test_a_contaminated_thought_is_rejected_with_what_it_repeats(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": ENGLISH[100:250]}))
    config = Checks(language="de", contamination=Contamination(files=(str(tmp_path / "test.jsonl"),)))
    checks = ThoughtChecks(config, ContaminationIndex(config.contamination))
    found = checks.check(ENGLISH, PROSE, True, False)
    assert found is not None
    assert found[0] == "contaminated"
    assert "water and air" in found[1]
    assert checks.check(GERMAN, PROSE, True, False) is None


def test_a_surely_foreign_thought_is_rejected_and_an_unsure_one_is_not() -> None:
    same, german = LanguageCheck("same"), LanguageCheck("de")
    assert same.find(ENGLISH, ENGLISH) is None
    assert same.find(GERMAN, ENGLISH) == "in 'de', its document in 'en'"
    assert same.find(CHINESE, ENGLISH) == "in 'zh', its document in 'en'"
    assert same.find(ENGLISH, CHINESE) == "in 'en', its document in 'zh'"
    assert same.find(GERMAN, "Too short to tell.") is None
    assert same.find(GERMAN[:150], ENGLISH) is None
    assert german.find(GERMAN, ENGLISH) is None
    assert german.find(f"{ENGLISH[:300]} {GERMAN[:300]}", GERMAN) is None
    assert german.find(ENGLISH, GERMAN) == "in 'en', not 'de'"
    assert same.find(HONEST["table"] + HONEST["table"], CHINESE) is None
    assert reason(ENGLISH, CHINESE, language="same") == "language"
    assert reason(ENGLISH, CHINESE, language=None) is None


def test_code_and_formulas_are_in_no_language() -> None:
    german = LanguageCheck("de")
    code = "for (int i = 0; i < rows; i++) { total[i] = weight[i] * value[i] + offset; if (total[i] > limit) { total[i] = limit; } }\n" * 8
    formulas = "We get \\frac{a_1 + b_1}{2} = \\sqrt{x^2 + y^2}, so \\alpha \\cdot (x + y) \\le 2^n - 1 and f(x) = x^3 - 3x + 1 > 0.\n" * 8
    for text in (code, formulas):
        assert sum(map(str.isalpha, text)) > 200
        assert not is_prose(text)
        assert german.find(text, GERMAN) is None


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"checks\.language='klingon' is unknown; give null, same, or one of .*de, .*en, "):
        ThoughtChecks(Checks(language="klingon"), None)
    with pytest.raises(ConfigError, match=r"checks\.refusals: '\(open' is no regular expression"):
        ThoughtChecks(Checks(refusals=("(open",)), None)


def test_languages_without_py3langid_name_the_extra_and_nothing_else_needs_it() -> None:
    program = (
        "import sys; sys.modules['py3langid'] = None\n"
        "from tpt_megatron.augment.checks import *\n"
        "assert ThoughtChecks(Checks(), None).check('good', 'text', True, False) is None\n"
        "try: ThoughtChecks(Checks(language='en'), None)\n"
        "except MachineError as error: print(error)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "tpt-megatron[generate]" in ended.stdout
