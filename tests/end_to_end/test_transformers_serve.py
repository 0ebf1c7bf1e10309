"""A real server of the chat-completions protocol, with a real if tiny model: what it answers, and what is read out of that."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from tests.support.tiny_model import running_transformers_serve, tiny_model_folder
from tpt_megatron.augment.engines.base import Reply
from tpt_megatron.augment.engines.openai import OpenAIEngine
from tpt_megatron.augment.trajectory import read_trajectory
from tpt_megatron.config.augment import OpenAIGenerator, Sampling

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("uvicorn") is None, reason="needs the packages of transformers' extra `serving`"),
]

STOP = ("</think>",)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory)


@pytest.fixture(scope="module")
def base_url(tiny_model: Path) -> Iterator[str]:
    with running_transformers_serve(tiny_model) as url:
        yield url


def question(number: int) -> tuple[dict[str, str], ...]:
    document = f"Note {number}. Photosynthesis turns light, water and carbon dioxide into sugar and oxygen. " * 5
    return ({"role": "user", "content": f"{document}\n## Thoughts\nSimulate an expert's in-depth thought process as they analyse the text."},)


def ask(base_url: str, model: Path, sampling: Sampling, requests: int) -> list[Reply]:
    config = OpenAIGenerator(kind="openai", model=str(model), base_urls=(base_url,), sampling=sampling, timeout_s=300)

    async def run() -> list[Reply]:
        engine = OpenAIEngine(config)
        await engine.open()
        try:
            return await asyncio.gather(*(engine.complete(question(i), sampling, i) for i in range(requests)))
        finally:
            await engine.close()

    return asyncio.run(run())


def test_whole_replies_hold_a_closed_thought_and_an_answer(base_url: str, tiny_model: Path) -> None:
    sampling = Sampling(max_tokens=128, stop=())
    replies = ask(base_url, tiny_model, sampling, 6)
    thoughts = [read_trajectory(reply, "reasoning", sampling.stop) for reply in replies]
    closed = [thought for thought in thoughts if thought.closed and thought.text]
    assert len(closed) >= 4, replies
    assert len({thought.text for thought in closed}) > 1, "each request has its own seed"
    for reply, thought in zip(replies, thoughts, strict=True):
        assert "<think>" not in thought.text and "</think>" not in thought.text
        assert reply.prompt_tokens > 100 and 0 < reply.generated_tokens <= 128
        if reply.finish_reason == "stop":
            assert read_trajectory(reply, "content", sampling.stop).text


def test_the_stop_text_ends_a_thought_that_counts_as_closed(base_url: str, tiny_model: Path) -> None:
    replies = ask(base_url, tiny_model, Sampling(temperature=0, max_tokens=128, stop=STOP), 3)
    for reply in replies:
        thought = read_trajectory(reply, "reasoning", STOP)
        assert reply.finish_reason == "stop" and thought.closed and len(thought.text) > 20, reply
        assert read_trajectory(reply, "content", STOP).text == ""


def test_a_cut_thought_is_not_closed(base_url: str, tiny_model: Path) -> None:
    (reply,) = ask(base_url, tiny_model, Sampling(temperature=0, max_tokens=6, stop=STOP), 1)
    thought = read_trajectory(reply, "reasoning", STOP)
    assert reply.finish_reason == "length" and not thought.closed and thought.text, reply


def test_what_the_server_sends_over_the_wire(base_url: str, tiny_model: Path) -> None:
    """The shape that the engine and `read_trajectory` rely on, as it comes from this server."""

    async def run() -> dict:
        body = {"model": str(tiny_model), "messages": list(question(0)), "temperature": 0, "max_tokens": 128}
        async with aiohttp.ClientSession() as session, session.post(f"{base_url}/chat/completions", json=body) as response:
            assert response.status == 200, await response.text()
            return await response.json()

    answer = asyncio.run(run())
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "stop"
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + answer["usage"]["completion_tokens"]
    reply = Reply(choice["message"]["content"], choice["message"].get("reasoning_content"), choice["finish_reason"])
    assert read_trajectory(reply, "reasoning", ()).text
