"""A model asked about documents, through the scripted server: what is asked, what is kept, and what a thought says of its making."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from tests.support.scripted_server import RunningServer, running_server
from tpt_megatron.augment.generators import Ingredients
from tpt_megatron.augment.outcome import Outcome
from tpt_megatron.config.augment import AugmentConfig
from tpt_megatron.errors import RecordError
from tpt_megatron.records import Document, text_id

TEXT = "".join(f"Sentence number {i} says that {i} and {i} are {2 * i}. " for i in range(60))


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server(reply_ms=1) as running:
        yield running


@pytest.fixture(autouse=True)
def no_faults(server: RunningServer) -> Iterator[None]:
    yield
    server.script()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.train_from_iterator([TEXT], tokenizers.trainers.BpeTrainer(vocab_size=400, show_progress=False))
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    backend.save(str(path))
    return str(path)


def think(server: RunningServer, document: Document, *generators: dict[str, Any], **changes: Any) -> list[Outcome]:
    asked = [{"kind": "openai", "model": "scripted", "base_urls": server.url} | generator for generator in generators or ({},)]
    values = {"input": "a", "output": "b", "document_tokens": None, "generator": asked} | changes
    config = AugmentConfig.model_validate(values)

    async def run() -> list[Outcome]:
        generators = Ingredients.of(config).generators()
        try:
            for one in generators:
                await one.open()
            return [await one.think(document, "f:1") for one in generators]
        finally:
            for one in generators:
                await one.close()

    return asyncio.run(run())


def test_a_thought_says_all_of_its_making(server: RunningServer) -> None:
    (outcome,) = think(server, Document("a", TEXT), {"name": "thinker", "revision": "abc123"})
    (thought,) = outcome.thoughts
    assert thought.generator == "thinker"
    assert thought.revision == "abc123"
    assert thought.prompt == "expert"
    assert thought.prompt_hash is not None
    assert len(thought.prompt_hash) == 16
    assert thought.sampling == {"temperature": 0.6, "top_p": 0.9, "max_tokens": 8192, "stop": ["</think>"], "extra": {}}
    assert thought.finish_reason == "stop"
    assert thought.document_hash == text_id(TEXT)[:16]
    assert (thought.seen_start, thought.seen_end) == (0, len(TEXT))
    assert thought.tokens == outcome.generated_tokens > 20
    assert thought.prompt_tokens == outcome.prompt_tokens > 100
    assert thought.created is not None
    assert thought.created.endswith("+00:00")
    assert isinstance(thought.seed, int)


def test_every_prompt_generator_and_sample_gives_one_and_no_two_share_a_seed(server: RunningServer, tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("Think about {{ document }} of {{ record.source }}")
    prompts = ["expert", str(tmp_path / "mine.jinja")]
    outcomes = think(server, Document("a", TEXT, "somewhere"), {"name": "one"}, {"name": "two"}, prompts=prompts, samples=3)
    thoughts = [thought for outcome in outcomes for thought in outcome.thoughts]
    assert [(thought.generator, thought.prompt, thought.sample) for thought in thoughts] == [
        (name, prompt, sample) for name in ("one", "two") for prompt in ("expert", "mine") for sample in range(3)
    ]
    assert len({thought.seed for thought in thoughts}) == len({thought.text for thought in thoughts}) == 12
    assert sum(outcome.requests for outcome in outcomes) == 12


def test_the_same_document_is_asked_with_the_same_seeds_again(server: RunningServer) -> None:
    first, second = (think(server, Document("a", TEXT), samples=2)[0] for _ in range(2))
    assert [thought.seed for thought in first.thoughts] == [thought.seed for thought in second.thoughts]
    other = think(server, Document("a", TEXT), samples=2, seed=1)[0]
    assert not {thought.seed for thought in first.thoughts} & {thought.seed for thought in other.thoughts}


def test_a_long_document_is_cut_and_the_thought_says_what_it_has_seen(server: RunningServer, tokenizer: str) -> None:
    (outcome,) = think(server, Document("a", TEXT), {"tokenizer": tokenizer}, document_tokens=200)
    (thought,) = outcome.thoughts
    assert thought.seen_start == 0
    assert thought.seen_end is not None
    assert 0 < thought.seen_end < len(TEXT)
    assert TEXT[: thought.seen_end].rstrip().endswith(".")
    counted = tokenizers.Tokenizer.from_file(tokenizer).encode(TEXT[: thought.seen_end])
    assert len(counted.ids) <= 200


def test_chunk_by_chunk_the_offsets_cover_the_document(server: RunningServer, tokenizer: str) -> None:
    (outcome,) = think(server, Document("a", TEXT), {"tokenizer": tokenizer}, chunks={"tokens": 100, "before_tokens": 50})
    spans = [(thought.seen_start, thought.seen_end) for thought in outcome.thoughts]
    assert len(spans) > 4
    assert "".join(TEXT[start:end] for start, end in spans) == TEXT
    assert len({thought.text for thought in outcome.thoughts}) == len(spans)


@pytest.mark.parametrize(("policy", "kept", "rejected", "requests"), [("drop", 0, 1, 1), ("keep", 1, 0, 1), ("retry", 0, 3, 3)])
def test_unclosed_thoughts_follow_the_setting(server: RunningServer, policy: str, kept: int, rejected: int, requests: int) -> None:
    server.script({"fault": "length"})
    (outcome,) = think(server, Document("a", TEXT), checks={"unclosed": policy, "retries": 2})
    assert (len(outcome.thoughts), len(outcome.rejections), outcome.requests) == (kept, rejected, requests)
    assert {rejection.reason for rejection in outcome.rejections} <= {"unclosed"}
    assert all(rejection.thought.text for rejection in outcome.rejections)
    assert len({rejection.thought.seed for rejection in outcome.rejections}) == rejected


def test_a_retry_that_closes_is_kept_and_what_it_cost_is_counted(server: RunningServer) -> None:
    server.script({"fault": "length", "next": 1})
    (outcome,) = think(server, Document("a", TEXT), checks={"unclosed": "retry"})
    assert (len(outcome.thoughts), len(outcome.rejections), outcome.requests) == (1, 1, 2)
    assert outcome.generated_tokens > (outcome.thoughts[0].tokens or 0)


@pytest.mark.parametrize(("fault", "reason"), [("empty", "empty"), ("refusal", "refused"), ("loop", "loop")])
def test_what_a_model_does_wrong_is_rejected_by_name(server: RunningServer, fault: str, reason: str) -> None:
    server.script({"fault": fault})
    (outcome,) = think(server, Document("a", TEXT))
    assert outcome.thoughts == ()
    assert [rejection.reason for rejection in outcome.rejections] == [reason]
    assert outcome.rejections[0].thought.prompt == "expert"


def test_a_thought_that_tells_an_evaluation_answer_is_rejected(server: RunningServer, tmp_path: Path) -> None:
    (outcome,) = think(server, Document("a", TEXT))
    leaked = outcome.thoughts[0].text
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "What?", "answer": f"It is so: {leaked}"}) + "\n")
    (outcome,) = think(server, Document("a", TEXT), checks={"contamination": {"files": str(tmp_path / "test.jsonl")}})
    assert [rejection.reason for rejection in outcome.rejections] == ["contaminated"]


def test_back_thinking_needs_question_and_answer(server: RunningServer) -> None:
    (outcome,) = think(server, Document("a", "Why is it so?", extra={"answer": "Because."}), prompts=["back_thinking"], fields={"text": "question"})
    assert len(outcome.thoughts) == 1
    with pytest.raises(RecordError, match="f:1: field 'answer' is missing, which prompt back_thinking uses"):
        think(server, Document("a", "Why is it so?"), prompts=["back_thinking"], fields={"text": "question"})


def test_the_answer_can_be_taken_for_the_thought(server: RunningServer) -> None:
    (outcome,) = think(server, Document("a", TEXT), {"thought_from": "content", "sampling": {"stop": []}})
    assert [thought.text for thought in outcome.thoughts] == ["So the text holds together."]
