import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tpt_megatron.config.preprocess import PreprocessConfig
from tpt_megatron.config.value import ValueConfig
from tpt_megatron.datasets import open_dataset
from tpt_megatron.evaluate.value_targets import Question, Questions, Reason, distinct
from tpt_megatron.preprocess.runner import run_preprocess
from tpt_megatron.record_files import encode_records
from tpt_megatron.records import AugmentedDocument, Document, Thought
from tpt_megatron.tokenizer import END_OF_DOCUMENT, TokenizerLike, load_tokenizer

TEXT = "What is 2 and 2? Two of them. #### 4"


def config(**changes: Any) -> ValueConfig:
    return ValueConfig.model_validate({"input": "in.jsonl", "output": "out", "model": "model"} | changes)


def document(text: str = TEXT, *thoughts: Thought, **extra: Any) -> AugmentedDocument:
    return AugmentedDocument(Document("d", text, None, extra), thoughts or (Thought("hm", "g", seen_end=16),))


def texts(question: Question | Reason, tokenizer: TokenizerLike) -> tuple[str, str, str]:
    """Return both sides, and the target."""
    assert isinstance(question, Question), question
    return *(tokenizer.decode(ids.tolist()) for ids in (question.with_thought, question.without)), tokenizer.decode(
        question.without[-question.target :].tolist()
    )


def asked(augmented: AugmentedDocument, longest: int = 1000, **changes: Any) -> tuple[Question | Reason, tuple[str, str, str]]:
    tokenizer = load_tokenizer("byte", END_OF_DOCUMENT)
    (question,) = Questions(config(**changes), tokenizer, longest).of(augmented)
    return question, texts(question, tokenizer) if isinstance(question, Question) else ("", "", "")


def test_the_continuation_follows_what_the_thought_saw() -> None:
    question, (with_thought, without, target) = asked(document())
    assert with_thought == "What is 2 and 2?\n<think>\nhm\n</think>\n Two of them. #### 4"
    assert (without, target) == (TEXT, " Two of them. #### 4")
    assert question == Question(question.with_thought, question.without, 20, False, 0, 0)  # type: ignore[union-attr]


def test_the_document_follows_the_thought_and_its_first_token_counts_on_neither_side() -> None:
    _, found = asked(document(), target="document")
    assert found == (f"<think>\nhm\n</think>\n{TEXT}", TEXT, TEXT[1:])
    _, at_start = asked(document(TEXT, Thought("hm", "g", seen_end=0)))
    assert at_start == found


@pytest.mark.parametrize(
    ("answer", "before", "target"),
    [
        ({"delimiter": "####"}, TEXT[:-2], " 4"),
        ({"pattern": r"(?=\d+$)"}, TEXT[:-1], "4"),
        ({"pattern": r"(?i)TWO "}, "What is 2 and 2? Two ", "of them. #### 4"),
    ],
)
def test_the_answer_in_the_document(answer: dict[str, str], before: str, target: str) -> None:
    question, found = asked(document(), target="answer", answer=answer)
    assert found == (f"{before}\n<think>\nhm\n</think>\n{target}", TEXT, target)
    assert not question.saw_target  # type: ignore[union-attr]
    for seen_end in (len(TEXT), None):  # one that does not say what it saw is about the whole document
        question, _ = asked(document(TEXT, Thought("hm", "g", seen_end=seen_end)), target="answer", answer=answer)
        assert question.saw_target  # type: ignore[union-attr]


def test_the_answer_of_a_field_follows_the_document_as_in_append() -> None:
    _, found = asked(document("What is 2 and 2?", solution=4), target="answer", answer={"field": "solution"})
    assert found == ("What is 2 and 2?\n<think>\nhm\n</think>\n4", "What is 2 and 2?\n4", "4")


@pytest.mark.parametrize(
    ("augmented", "changes", "reason"),
    [
        (document(TEXT, Thought("hm", "g", seen_end=len(TEXT))), {}, "nothing_follows"),
        (document(TEXT, Thought("hm", "g")), {}, "nothing_follows"),  # what it saw is not known: all of it
        (document("x", Thought("hm", "g")), {"target": "document"}, "nothing_follows"),
        (document(), {"target": "answer", "answer": {"field": "solution"}}, "no_answer"),
        (document(solution=" "), {"target": "answer", "answer": {"field": "solution"}}, "no_answer"),
        (document(solution=True), {"target": "answer", "answer": {"field": "solution"}}, "no_answer"),
        (document(), {"target": "answer", "answer": {"delimiter": "Answer:"}}, "no_answer"),
        (document(), {"target": "answer", "answer": {"pattern": "4$"}}, "no_answer"),
        (document(TEXT, Thought("hm" * 50, "g", seen_end=16)), {"longest": 120}, "too_long"),
    ],
)
def test_without_a_target_there_is_a_reason(augmented: AugmentedDocument, changes: dict[str, Any], reason: str) -> None:
    question, _ = asked(augmented, **({"longest": 1000} | changes))
    assert question == reason


def test_too_long_ones_lose_the_targets_end_and_then_the_contexts_beginning() -> None:
    text = "c" * 40 + "t" * 40  # and 25 tokens for the thought and what is around it
    for longest, context, target in ((200, 40, 40), (105, 40, 40), (90, 40, 25), (80, 35, 20), (60, 20, 15), (44, 8, 11)):
        question, (with_thought, without, wanted) = asked(document(text, Thought("t hm t", "g", seen_end=40)), longest)
        assert isinstance(question, Question)
        assert without == "c" * context + "t" * target
        assert with_thought == f"{'c' * context}\n<think>\nt hm t\n</think>\n{'t' * target}"
        assert wanted == "t" * target
        assert len(question.with_thought) <= longest
        assert (question.target_cut, question.context_cut) == (40 - target, 40 - context)
    question, found = asked(document(text, Thought("t hm t", "g", seen_end=40)), 1000, target_tokens=3)
    assert found[2] == "ttt"
    assert question.target_cut == 37  # type: ignore[union-attr]
    question, found = asked(document(text, Thought("t", "g", seen_end=40)), 26)  # no context is left: the first token of the target is not predicted
    assert found == ("<think>\nt\n</think>\n" + "t" * 6, "t" * 6, "t" * 5)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A byte-level BPE tokenizer in which <think> is one token and words are several, and characters of several bytes too."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=500, special_tokens=[END_OF_DOCUMENT, "<think>"], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([Path(__file__).read_text(encoding="utf-8")], trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    backend.save(str(path))
    return str(path)


words = st.text(st.sampled_from("ab cé漢\n.<think>"), min_size=1, max_size=30).filter(lambda text: text.strip() != "")


@settings(max_examples=25)
@given(words, st.lists(st.tuples(words, st.integers(0, 30)), min_size=1, max_size=3))
def test_what_is_asked_is_what_interleave_trains_on(tmp_path_factory: pytest.TempPathFactory, bpe: str, text: str, thoughts: list[tuple[str, int]]) -> None:
    """Each thought by itself, with what follows it, token by token as `tpt preprocess` writes it; and without it, as vanilla is."""
    folder = tmp_path_factory.mktemp("arms")
    given_thoughts = tuple(Thought(thought, "g", seen_end=min(end, len(text))) for thought, end in thoughts)
    augmented = AugmentedDocument(Document("d", text), given_thoughts)
    (folder / "in.jsonl").write_bytes(encode_records([augmented], "jsonl"))
    made = {"input": str(folder / "in.jsonl"), "output": folder / "out", "tokenizer": bpe, "arms": ["interleave", "vanilla"], "thoughts": "samples"}
    run_preprocess(PreprocessConfig.model_validate(made))
    interleaved, vanilla = (open_dataset(folder / f"out/{arm}/train") for arm in ("interleave", "vanilla"))
    questions = Questions(config(), load_tokenizer(bpe, END_OF_DOCUMENT), 10_000).of(augmented)
    for number, question in enumerate(questions):
        trained = interleaved.tokens[interleaved.offsets[number] : interleaved.offsets[number + 1] - 1]
        if question == "nothing_follows":
            assert given_thoughts[number].seen_end or len(vanilla.tokens) == 2
            continue
        assert isinstance(question, Question)
        assert question.with_thought.tolist() == trained.tolist()
        assert question.without.tolist() == vanilla.tokens[:-1].tolist()
        assert question.with_thought[-question.target :].tolist() == question.without[-question.target :].tolist()


def test_equal_sides_are_asked_once() -> None:
    augmented = document(TEXT, Thought("one", "g", seen_end=16), Thought("two", "g", seen_end=8), Thought("one", "g", seen_end=16))
    questions = [q for q in Questions(config(), load_tokenizer("byte", END_OF_DOCUMENT), 1000).of(augmented) if isinstance(q, Question)]
    sides, pairs = distinct(questions)
    assert pairs == [(0, 1), (2, 1), (0, 1)]
    assert [wanted for _, wanted in sides] == [20, 28, 28]
    assert hashlib.sha256(sides[1][0].tobytes()).digest() == hashlib.sha256(questions[0].without.tobytes()).digest()
    assert np.array_equal(sides[2][0], questions[1].with_thought)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"target": "answer"}, "target=answer needs answer.field"),
        ({"answer": {"field": "x"}}, "no other target takes them"),
        ({"target": "answer", "answer": {"field": "x", "pattern": "y"}}, "give one of field, delimiter and pattern"),
        ({"target": "answer", "answer": {"pattern": "("}}, "is not a regular expression"),
        ({"field": "tokens"}, "is a thought's own"),
        ({"field": "a.b"}, "has a dot"),
        ({"shard": "3/2"}, "must be NUMBER/COUNT"),
        ({"device": "gpu"}, "device"),
    ],
)
def test_impossible_configs_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        config(**changes)
