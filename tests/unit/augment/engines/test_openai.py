"""The engine against a real server that fails as told. Times are short; what they bound is generous, since machines are busy."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Iterable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.support.scripted_server import running_server, thought_for
from tpt_megatron.augment.engines.balance import Balance, Server
from tpt_megatron.augment.engines.base import Messages, Reply, RequestFailed
from tpt_megatron.augment.engines.chat_completions import error_message, request_body, retry_after_s
from tpt_megatron.augment.engines.openai import OpenAIEngine
from tpt_megatron.config.augment import Concurrency, OpenAIGenerator, Sampling
from tpt_megatron.errors import ConfigError, MachineError

SAMPLING = Sampling()


def config(*urls: str, **settings: Any) -> OpenAIGenerator:
    return OpenAIGenerator(kind="openai", base_urls=urls, **{"model": "scripted", "timeout_s": 20, "outage_limit_s": 20, **settings})


def chat(text: str) -> Messages:
    return ({"role": "user", "content": text},)


@asynccontextmanager
async def opened(settings: OpenAIGenerator) -> AsyncIterator[OpenAIEngine]:
    engine = OpenAIEngine(settings)
    await engine.open()
    try:
        yield engine
    finally:
        await engine.close()


async def ask(engine: OpenAIEngine, text: str = "a document", sampling: Sampling = SAMPLING) -> Reply:
    return await engine.complete(chat(text), sampling, seed=7)


async def ask_all(engine: OpenAIEngine, texts: Iterable[str]) -> dict[str, Reply | BaseException]:
    """Ask as many at once as the engine has capacity for; the error where one failed for good."""
    todo, results = list(reversed(list(texts))), {}

    async def work() -> None:
        while todo:
            text = todo.pop()
            try:
                results[text] = await ask(engine, text)
            except RequestFailed as error:
                results[text] = error

    await asyncio.gather(*(work() for _ in range(engine.capacity)))
    return results


def run(settings: OpenAIGenerator, text: str = "a document", sampling: Sampling = SAMPLING) -> Reply:
    async def main() -> Reply:
        async with opened(settings) as engine:
            return await ask(engine, text, sampling)

    return asyncio.run(main())


def unused_url() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/v1"


# What a good reply says


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
def test_reasoning_is_read_under_either_name(field: str) -> None:
    with running_server(thought_in=field) as server:
        reply = run(config(server.url))
    thought = thought_for("a document", 7)
    assert reply == Reply(None, thought, "stop", "</think>", 2, len(thought.split(" ")), "scripted", attempts=1)


def test_inline_thoughts_and_parts_are_content() -> None:
    thought = thought_for("a document", 7)
    with running_server(thought_in="inline") as server:
        assert run(config(server.url)).content == f"<think>\n{thought}"
    with running_server(thought_in="parts", no_usage=True) as server:
        reply = run(config(server.url))
    assert (reply.content, reply.reasoning, reply.generated_tokens) == (thought, None, None)


def test_a_reply_cut_off_and_an_empty_one_come_as_they_are() -> None:
    with running_server(script=[{"fault": "length", "match": "long"}, {"fault": "empty", "match": "dull"}]) as server:
        cut, empty = run(config(server.url), "long"), run(config(server.url), "dull")
    assert (cut.finish_reason, cut.content, cut.stop_reason) == ("length", None, None)
    assert (empty.finish_reason, empty.content, empty.reasoning) == ("stop", None, None)


def test_the_request_says_what_sampling_says() -> None:
    sampling = Sampling(temperature=0.5, top_k=20, stop=("x",), max_tokens=9, extra={"min_p": 0.1, "top_p": 0.3})
    assert orjson.loads(request_body("m", chat("é"), sampling, 3)) == {
        **{"model": "m", "messages": [{"role": "user", "content": "é"}], "temperature": 0.5, "top_p": 0.3, "max_tokens": 9, "seed": 3},
        **{"top_k": 20, "stop": ["x"], "min_p": 0.1},
    }
    assert not {"top_k", "stop"} & orjson.loads(request_body("m", chat("a"), Sampling(stop=()), 3)).keys()


def test_a_document_of_megabytes_is_sent() -> None:
    with running_server() as server:
        assert run(config(server.url), "word " * 400_000).prompt_tokens == 400_001


# Faults that pass


@pytest.mark.parametrize(
    "fault",
    [
        *({"fault": "status", "status": status} for status in (408, 429, 500, 502, 503, 504)),
        *({"fault": fault} for fault in ("reset", "truncate", "malformed", "html", "no_choices")),
    ],
    ids=lambda fault: str(fault.get("status", fault["fault"])),
)
def test_a_fault_that_passes_costs_attempts_only(fault: dict[str, Any]) -> None:
    with running_server(script=[fault | {"next": 2}]) as server:
        reply = run(config(server.url))
        assert (reply.reasoning, reply.attempts) == (thought_for("a document", 7), 3)
        assert server.log()["requests"] == 3


@pytest.mark.parametrize("fault", ["hang", "drip"])
def test_a_reply_that_does_not_come_whole_in_time_is_asked_for_again(fault: str) -> None:
    with running_server(script=[{"fault": fault, "next": 1}]) as server:
        assert run(config(server.url, timeout_s=0.5)).attempts == 2


def test_many_faults_at_once_lose_nothing() -> None:
    faults = [{"fault": "status", "status": status, "share": 0.03} for status in (429, 500, 503)]
    faults += [{"fault": fault, "share": 0.03} for fault in ("reset", "truncate", "malformed")]
    texts = [f"document {number}" for number in range(300)]

    async def main(url: str) -> dict[str, Reply | BaseException]:
        async with opened(config(url)) as engine:
            return await ask_all(engine, texts)

    with running_server(script=faults) as server:
        results = asyncio.run(main(server.url))
        assert sum(server.log()["faults"].values()) > 30
    assert {text: reply.reasoning for text, reply in results.items() if isinstance(reply, Reply)} == {text: thought_for(text, 7) for text in texts}


def test_retry_after_is_honoured() -> None:
    with running_server(script=[{"fault": "status", "status": 429, "retry_after": "2", "next": 1}]) as server:
        began = time.monotonic()
        run(config(server.url))
        assert time.monotonic() - began > 2


def test_retry_after_is_seconds_or_a_date_or_nothing() -> None:
    now = datetime(2026, 1, 1, 12, tzinfo=UTC)
    assert retry_after_s("7", now) == 7
    assert retry_after_s("Thu, 01 Jan 2026 12:00:30 GMT", now) == 30
    assert retry_after_s("Thu, 01 Jan 2026 11:00:00 GMT", now) == 0
    assert retry_after_s("soon", now) is None
    assert retry_after_s("Thu, 01 Jan 2026 12:00:30", now) is None


def test_a_server_that_takes_few_at_once_gets_few_at_once() -> None:
    async def main(url: str) -> tuple[int, list[Any]]:
        async with opened(config(url, concurrency=Concurrency(initial=64))) as engine:
            results = await ask_all(engine, (str(number) for number in range(400)))
            return engine.capacity, list(results.values())

    with running_server(most_at_once=8, reply_ms=20) as server:
        capacity, replies = asyncio.run(main(server.url))
        assert server.log()["faults"] == {"status 429": pytest.approx(150, abs=150)}
    assert capacity < 24
    assert all(isinstance(reply, Reply) for reply in replies)


# Requests that never succeed


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"fault": "status", "status": 500, "message": "division by zero"}, "status 500: division by zero"),
        ({"fault": "truncate"}, "truncated reply"),
        ({"fault": "malformed"}, "malformed JSON"),
        ({"fault": "html"}, "wrong content type: text/html"),
        ({"fault": "no_choices"}, "no choices"),
        ({"fault": "hang"}, "timed out: no whole reply within 0.5 s"),
        ({"fault": "drip"}, "timed out"),
    ],
    ids=lambda value: value["fault"] if isinstance(value, dict) else "",
)
def test_a_request_that_always_fails_is_given_up_while_others_succeed(fault: dict[str, Any], reason: str) -> None:
    async def main(url: str) -> dict[str, Reply | BaseException]:
        async with opened(config(url, attempts=2, timeout_s=0.5, concurrency=Concurrency(initial=4))) as engine:
            return await ask_all(engine, ["poison", *(str(number) for number in range(600))])

    with running_server(script=[fault | {"match": "poison"}]) as server:
        results = asyncio.run(main(server.url))
        assert server.log()["requests"] < 612
    failed = results.pop("poison")
    assert isinstance(failed, RequestFailed) and reason in str(failed) and "2 times" in str(failed)
    assert all(isinstance(reply, Reply) for reply in results.values()) and len(results) == 600


@pytest.mark.parametrize("fault", [{"fault": "status", "status": 500}, {"fault": "hang"}], ids=["500", "hang"])
def test_a_lone_request_that_always_fails_is_given_up_once_the_server_answers_another_again(fault: dict[str, Any]) -> None:
    async def main(url: str) -> None:
        async with opened(config(url, attempts=2, timeout_s=0.5)) as engine:
            await ask(engine, "good")
            await ask(engine, "poison")

    with running_server(script=[fault | {"match": "poison"}], document_pattern=r"(.*)") as server:
        with pytest.raises(RequestFailed, match="2 times"):
            asyncio.run(main(server.url))
        assert server.log()["documents"]["poison"] == 2


def test_a_refused_request_is_given_up_at_once_with_the_servers_words() -> None:
    with running_server(max_tokens=100) as server:
        with pytest.raises(RequestFailed, match="status 400: max_tokens=8192 is more than the model's length of 100 tokens"):
            run(config(server.url))
        assert server.log()["requests"] == 1


def test_a_server_that_refuses_everything_ends_the_run() -> None:
    async def main(url: str) -> None:
        async with opened(config(url)) as engine:
            await ask_all(engine, (str(number) for number in range(100)))

    with running_server(max_tokens=100) as server, pytest.raises(MachineError, match=r"first 20 requests.*max_tokens=8192.*generator\.sampling"):
        asyncio.run(main(server.url))


def test_refusals_after_a_success_end_nothing() -> None:
    async def main(url: str) -> dict[str, Reply | BaseException]:
        async with opened(config(url)) as engine:
            await ask(engine, "good")
            return await ask_all(engine, (f"bad {number}" for number in range(50)))

    with running_server(script=[{"fault": "status", "status": 422, "match": "bad"}]) as server:
        results = asyncio.run(main(server.url))
    assert [type(result) for result in results.values()] == [RequestFailed] * 50


# Wrong settings


def test_a_model_that_is_not_served_is_a_config_error() -> None:
    with running_server(model="qwen") as server, pytest.raises(ConfigError, match=r"generator\.model=scripted is not served by http.*/v1, which has qwen"):
        run(config(server.url))


@pytest.mark.parametrize("status", [404, 500])
def test_a_server_without_a_list_of_models_is_asked_anyway(status: int) -> None:
    with running_server(models_status=status) as server:
        assert run(config(server.url)).attempts == 1
        with pytest.raises(MachineError, match=r"status 404: The model `other` does not exist\.; check generator\.model"):
            run(config(server.url, model="other"))


def test_a_folder_that_the_server_does_not_list_may_still_be_served(tmp_path: Path) -> None:
    with running_server() as server, pytest.raises(MachineError, match="status 404"):
        run(config(server.url, model=str(tmp_path)))


KEY = "sk-Secret0123456789"


def test_the_key_is_sent_and_shown_nowhere(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("SOME_KEY", KEY)

    async def main(url: str) -> str:
        async with opened(config(url, api_key_env="SOME_KEY")) as engine:
            reply = await ask(engine)
            return f"{reply} {engine!r} {engine.notes()} {engine._session!r}"

    with running_server(api_key=KEY, models_status=401) as server:
        shown = asyncio.run(main(server.url))
    with running_server(api_key="another") as server, pytest.raises(MachineError, match=r"status 401: Incorrect API key.*into SOME_KEY") as error:
        asyncio.run(main(server.url))
    assert "***" in str(error.value)
    assert KEY.lower() not in f"{shown} {error.value!r} {error.value.__context__!r} {caplog.text}".lower()


def test_a_password_in_a_url_is_not_shown() -> None:
    with pytest.raises(MachineError, match="no server answered") as error:
        run(config(unused_url().replace("//", "//me:hidden@"), outage_limit_s=0))
    assert "hidden" not in str(error.value)


def test_a_key_that_no_header_can_carry_is_refused_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "sk-a\nb")
    with pytest.raises(ConfigError, match="api_key_env=SOME_KEY: the variable holds") as error:
        OpenAIEngine(config("http://127.0.0.1:1/v1", api_key_env="SOME_KEY"))
    assert "sk-a" not in str(error.value)


# Outages


def test_a_server_that_comes_up_late_is_waited_for() -> None:
    with running_server() as server:
        server.kill()

        async def main() -> Reply:
            starting = asyncio.create_task(_later(1.5, server.start))
            async with opened(config(server.url)) as engine:
                reply = await ask(engine)
            await starting
            return reply

        assert asyncio.run(main()).attempts == 1


async def _later(seconds: float, action: Any) -> None:
    await asyncio.sleep(seconds)
    await asyncio.to_thread(action)


def test_an_outage_of_seconds_costs_nothing() -> None:
    texts = [str(number) for number in range(3000)]

    async def main() -> tuple[dict[str, Reply | BaseException], int]:
        async with opened(config(server.url, attempts=1, concurrency=Concurrency(initial=32, maximum=32))) as engine:
            work = asyncio.create_task(ask_all(engine, texts))
            await asyncio.sleep(0.4)
            assert not work.done()
            await asyncio.to_thread(server.kill)
            await _later(3, server.start)
            return await work, engine.capacity

    with running_server(reply_ms=20) as server:
        results, capacity = asyncio.run(main())
    assert {text for text, reply in results.items() if isinstance(reply, Reply)} == set(texts)
    assert capacity == 32
    assert max(reply.attempts for reply in results.values() if isinstance(reply, Reply)) < 20


def test_a_server_that_is_gone_for_good_ends_every_request() -> None:
    async def main() -> list[Any]:
        async with opened(config(server.url, outage_limit_s=2)) as engine:
            await ask(engine)
            await asyncio.to_thread(server.kill)
            ended = await asyncio.gather(*(ask(engine, str(number)) for number in range(60)), return_exceptions=True)
            with pytest.raises(MachineError):
                await ask(engine)
            return ended

    with running_server() as server:
        began = time.monotonic()
        errors = asyncio.run(main())
    assert 2 < time.monotonic() - began < 12
    assert {type(error) for error in errors} == {MachineError}
    assert all(text in str(errors[0]) for text in (server.url, "no server answered for", "connection refused", "finished work is kept"))


@pytest.mark.parametrize("fault", [{"fault": "status", "status": 500}, {"fault": "status", "status": 503}, {"fault": "html"}], ids=["500", "503", "html"])
def test_a_server_that_answers_nothing_but_errors_is_an_outage(fault: dict[str, Any]) -> None:
    async def main(url: str) -> list[Any]:
        async with opened(config(url, outage_limit_s=3, attempts=2)) as engine:
            return await asyncio.gather(*(ask(engine, str(number)) for number in range(20)), return_exceptions=True)

    with running_server(script=[fault]) as server:
        assert {type(error) for error in asyncio.run(main(server.url))} == {MachineError}


def test_a_hung_server_is_an_outage_and_no_requests_fault() -> None:
    async def main(url: str) -> list[Any]:
        async with opened(config(url, timeout_s=0.7, outage_limit_s=3, attempts=1)) as engine:
            return await asyncio.gather(*(ask(engine, str(number)) for number in range(20)), return_exceptions=True)

    with running_server(script=[{"fault": "hang"}]) as server:
        assert {type(error) for error in asyncio.run(main(server.url))} == {MachineError}


def test_requests_that_may_still_be_answered_are_no_outage() -> None:
    async def main(url: str) -> tuple[Reply, Reply]:
        async with opened(config(url, outage_limit_s=1, attempts=1)) as engine:
            return await asyncio.gather(ask(engine, "slow"), ask(engine, "poison"))

    slowly = {"fault": "loop", "match": "slow", "delay_ms": 3000}
    with running_server(script=[slowly, {"fault": "status", "status": 503, "match": "poison", "retry_after": "1", "next": 2}]) as server:
        slow, poison = asyncio.run(main(server.url))
    assert slow.attempts == 1 and poison.attempts == 3


# Several servers


def test_requests_go_where_room_is() -> None:
    async def main(*urls: str) -> tuple[int, list[int]]:
        async with opened(config(*urls, concurrency=Concurrency(initial=8, maximum=8))) as engine:
            await ask_all(engine, (str(number) for number in range(800)))
            return engine.capacity, [server["succeeded"] for server in engine.notes()["servers"]]

    with running_server(reply_ms=10) as quick, running_server(reply_ms=40) as slow:
        capacity, (by_quick, by_slow) = asyncio.run(main(quick.url, slow.url))
        assert slow.log()["peak_under_way"] <= 8
    assert capacity == 16
    assert 2 < by_quick / by_slow < 6
    assert by_quick + by_slow == 800


def test_requests_below_capacity_are_spread_too() -> None:
    async def main(*urls: str) -> list[int]:
        async with opened(config(*urls)) as engine:
            for first in range(0, 80, 8):
                await asyncio.gather(*(ask(engine, str(first + number)) for number in range(8)))
            return [server["succeeded"] for server in engine.notes()["servers"]]

    with running_server() as one, running_server() as other:
        assert asyncio.run(main(one.url, other.url)) == [40, 40]


def test_a_dead_server_among_two_gets_a_try_now_and_then_until_it_is_back() -> None:
    async def main() -> None:
        async with opened(config(alive.url, dead.url, concurrency=Concurrency(initial=16, maximum=16))) as engine:
            results = await ask_all(engine, (f"a {number}" for number in range(800)))
            assert all(isinstance(reply, Reply) for reply in results.values()) and len(results) == 800
            note = engine.notes()["servers"][1]
            assert note["resting"] and note["failed"]["connection refused"] < 30
            await asyncio.to_thread(dead.start)
            deadline = time.monotonic() + 20
            while engine.notes()["servers"][1]["resting"] and time.monotonic() < deadline:
                await ask_all(engine, (f"b {number}" for number in range(100)))
            await ask_all(engine, (f"c {number}" for number in range(400)))
            assert engine.notes()["servers"][1]["succeeded"] > 100

    with running_server() as alive, running_server() as dead:
        dead.kill()
        asyncio.run(main())


def test_a_broken_server_among_two_swallows_no_requests() -> None:
    async def main(*urls: str) -> list[Any]:
        async with opened(config(*urls, attempts=3, concurrency=Concurrency(initial=16, maximum=16))) as engine:
            return list((await ask_all(engine, (str(number) for number in range(800)))).values())

    with running_server(reply_ms=20) as good, running_server(script=[{"fault": "status", "status": 500}], reply_ms=1) as broken:
        replies = asyncio.run(main(good.url, broken.url))
        assert broken.log()["requests"] < 80
    assert all(isinstance(reply, Reply) for reply in replies)


# Cancellation


def test_a_cancelled_request_frees_its_place() -> None:
    async def main(url: str) -> None:
        async with opened(config(url, concurrency=Concurrency(initial=2, maximum=2))) as engine:
            tasks = [asyncio.create_task(ask(engine, f"slow {number}")) for number in range(6)]  # two under way, four wait for room
            await asyncio.sleep(0.3)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            assert all(task.cancelled() for task in tasks)
            assert engine.notes()["servers"][0]["under_way"] == 0
            await _soon(asyncio.gather(*(ask(engine, str(number)) for number in range(10))))

    with running_server(script=[{"fault": "hang", "match": "slow"}]) as server:
        asyncio.run(main(server.url))
        assert server.log()["under_way"] == 0


async def _soon(waited: Awaitable[Any]) -> None:
    async with asyncio.timeout(10):
        await waited


def test_a_place_handed_over_at_the_moment_of_cancelling_is_not_lost() -> None:
    async def main() -> None:
        server = Server("http://host/v1", Concurrency(initial=1, maximum=1))
        balance = Balance([server])
        place = await balance.place()
        waiting = asyncio.create_task(balance.place())
        await asyncio.sleep(0)
        balance.give_back(place)  # the waiting task has its place, and has not run yet
        waiting.cancel()
        await asyncio.wait([waiting])
        assert waiting.cancelled() and server.limit.under_way == 0

    asyncio.run(main())


def test_messages_of_errors_are_found_where_servers_put_them() -> None:
    for body in (b'{"error":{"message":"m"}}', b'{"error":"m"}', b'{"message":"m"}', b'{"detail":"m"}', b"m"):
        assert error_message(body) == "m"
    assert error_message(b"<html>\n" + b"x" * 9000).startswith("<html> xxx") and len(error_message(b"x" * 9000)) == 500
