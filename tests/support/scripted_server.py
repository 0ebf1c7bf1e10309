"""A chat-completions server that answers from a hash of the request, and fails as it is told: `python -m tests.support.scripted_server`.

It prints `{"port": ...}` on one line when it listens. Its own HTTP over asyncio, since a framework would cost more than the
client under test, and since half a reply or a reset is easily had here.

    POST /v1/chat/completions   a thought of some 60 words; the same request gets the same thought, another gets another
    GET  /v1/models, /health
    GET  /log                   counts since the start: see `Server.log`
    POST /script                replaces the faults: a JSON list of rules; see `Rule`
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

FAULTS = (
    *("status", "reset", "hang", "drip", "truncate", "malformed", "html", "no_choices"),  # of the transport
    *("length", "empty", "refusal", "loop"),  # of the model
)

_STARTS = ("First of all", "Looking closer", "To be sure", "By contrast", "In practice", "Put simply", "Step by step", "Strictly speaking")
_SUBJECTS = ("the author", "this passage", "the second example", "an attentive reader", "the main claim", "the underlying method", "a hidden assumption")
_VERBS = ("relies on", "points towards", "follows from", "seems to contradict", "builds upon", "quietly replaces", "explains", "depends on")
_ADJECTIVES = ("general", "careful", "earlier", "numerical", "practical", "surprising", "familiar", "simple", "broader", "historical")
_NOUNS = ("principle", "measurement", "definition", "pattern", "comparison", "argument", "observation", "relationship", "consequence")
_ENDS = ("which matters later", "as the numbers show", "so far at least", "for a good reason", "although that needs care", "and nothing else does")
_PARTS = (_STARTS, _SUBJECTS, _VERBS, _ADJECTIVES, _NOUNS, _ENDS)
_SENTENCES = 5


def thought_for(prompt: str, seed: int | None) -> str:
    """Return the text that the server thinks about a prompt: sentences chosen by the hash of prompt and seed."""
    number = int.from_bytes(hashlib.blake2b(f"{seed}\0{prompt}".encode(), digest_size=32).digest(), "big")
    sentences = []
    for _ in range(_SENTENCES):
        words = []
        for part in _PARTS:
            number, choice = divmod(number, len(part))
            words.append(part[choice])
        start, subject, verb, adjective, noun, end = words
        number, figure = divmod(number, 1000)
        sentences.append(f"{start}, {subject} {verb} the {adjective} {noun} number {figure}, {end}.")
    return " ".join(sentences)


@dataclass
class Rule:
    """One fault, and the requests it befalls: those whose prompt contains `match`, the `next` so many or a `share` of them.

    fault        one of FAULTS
    status       the status under fault=status, with Retry-After where `retry_after` is given and `message` in its body
    delay_ms     replaces --reply-ms for these requests
    times        of the same prompt: after so many faults it is spared
    """

    fault: str
    match: str = ""
    next: int | None = None
    share: float = 1.0
    times: int | None = None
    status: int = 500
    retry_after: str | None = None
    message: str = "a fault that the script asked for"
    delay_ms: float | None = None

    def __post_init__(self) -> None:
        if self.fault not in FAULTS:
            raise ValueError(f"fault={self.fault!r}; there are {', '.join(FAULTS)}")
        self.met: Counter[str] = Counter()

    def befalls(self, prompt: str, rng: random.Random) -> bool:
        if self.match not in prompt or self.next == 0 or (self.share < 1 and rng.random() >= self.share):
            return False
        if self.times is not None:
            if self.met[prompt] >= self.times:
                return False
            self.met[prompt] += 1
        if self.next is not None:
            self.next -= 1
        return True


class Server:
    """What all connections share: options, faults, counts."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.rules: list[Rule] = []
        self.rng = random.Random(0)
        self.document = re.compile(options.document_pattern) if options.document_pattern else None
        self.requests = self.replies = self.under_way = self.peak_under_way = self.connections = 0
        self.faults: Counter[str] = Counter()
        self.documents: Counter[str] = Counter()

    def log(self) -> dict[str, Any]:
        """Return counts: requests, good replies, faults by kind, connections, requests of each document, most under way at once.

        A document is what --document-pattern finds in the last message (its first group), else the hash of the messages.
        """
        return {
            "requests": self.requests,
            "replies": self.replies,
            "faults": self.faults,
            "documents": self.documents,
            "connections": self.connections,
            "under_way": self.under_way,
            "peak_under_way": self.peak_under_way,
        }

    def fault_for(self, prompt: str, request: dict[str, Any]) -> Rule | None:
        options = self.options
        if request.get("model") != options.model:
            return Rule("status", status=404, message=f"The model `{request.get('model')}` does not exist.")
        if options.max_tokens is not None and request.get("max_tokens", 0) > options.max_tokens:
            return Rule("status", status=400, message=f"max_tokens={request['max_tokens']} is more than the model's length of {options.max_tokens} tokens")
        if options.most_at_once is not None and self.under_way > options.most_at_once:
            return Rule("status", status=options.overload_status, message="too many requests at once", delay_ms=1)
        for rule in self.rules:
            if rule.befalls(prompt, self.rng):
                return rule
        return None

    def count_document(self, prompt: str, last: str) -> None:
        found = self.document.search(last) if self.document else None
        self.documents[found.group(1) if found else hashlib.sha256(prompt.encode()).hexdigest()[:16]] += 1

    def completion(self, request: dict[str, Any], prompt: str, fault: str | None) -> dict[str, Any]:
        """Return the JSON of a good reply, or of one with which something is wrong that JSON can express."""
        thought, answer = thought_for(prompt, request.get("seed")), "So the text holds together."
        stopped = "</think>" in (request.get("stop") or ())
        finish_reason = "stop"
        match fault:
            case "length":
                thought, finish_reason = thought[: len(thought) // 2], "length"
            case "empty":
                thought = ""
            case "refusal":
                thought = "I'm sorry, but I can't help with that."
            case "loop":
                thought = f"{thought.partition('.')[0]}. " * 12
        ends = stopped or fault == "length"
        message: dict[str, Any] = {"role": "assistant", "content": None if ends else answer}
        match self.options.thought_in:
            case "inline":
                message["content"] = f"<think>\n{thought}" if ends else f"<think>\n{thought}\n</think>\n\n{answer}"
            case "content":
                message["content"] = thought
            case "parts":
                half = len(thought) // 2
                message["content"] = [{"type": "text", "text": thought[:half]}, {"type": "image"}, {"type": "text", "text": thought[half:]}]
            case name:
                message[name] = thought
        choice = {"index": 0, "message": message, "finish_reason": finish_reason, "stop_reason": "</think>" if stopped and finish_reason == "stop" else None}
        prompt_tokens, generated = prompt.count(" ") + 1, thought.count(" ") + 1
        reply: dict[str, Any] = {"id": f"chatcmpl-{self.requests}", "object": "chat.completion", "created": 0, "model": self.options.model}
        reply["choices"] = [] if fault == "no_choices" else [choice]
        if not self.options.no_usage:
            reply["usage"] = {"prompt_tokens": prompt_tokens, "completion_tokens": generated, "total_tokens": prompt_tokens + generated}
        return reply


def _http(status: int, body: bytes, content_type: str = "application/json", extra: str = "") -> bytes:
    head = f"HTTP/1.1 {status} .\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n{extra}\r\n"
    return head.encode() + body


class Connection(asyncio.Protocol):
    """One client's connection: requests one after the other, as HTTP/1.1 clients send them."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.buffer = b""
        self.working: asyncio.TimerHandle | None = None  # on a reply

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.server.connections += 1

    def connection_lost(self, error: Exception | None) -> None:
        if self.working is not None:
            self.working.cancel()
            self._done()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, separator, rest = self.buffer.partition(b"\r\n\r\n")
        if not separator:
            return
        lowered = head.lower()
        at = lowered.find(b"content-length:")
        length = int(head[at + 15 :].partition(b"\r\n")[0]) if at >= 0 else 0
        if len(rest) < length:
            return
        self.buffer = rest[length:]
        method, path, _ = head.split(b"\r\n", 1)[0].split(b" ")
        self._answer(method + b" " + path, head, rest[:length])

    def _answer(self, what: bytes, head: bytes, body: bytes) -> None:
        server = self.server
        match what:
            case b"POST /v1/chat/completions":
                self._chat(head, body)
            case b"GET /v1/models" if server.options.models_status == 200:
                data = [{"id": server.options.model, "object": "model"}]
                self.transport.write(_http(200, orjson.dumps({"object": "list", "data": data})))
            case b"GET /v1/models":
                self.transport.write(_http(server.options.models_status, b"{}"))
            case b"GET /health":
                self.transport.write(_http(200, b"{}"))
            case b"GET /log":
                self.transport.write(_http(200, orjson.dumps(server.log())))
            case b"POST /script":
                try:
                    server.rules = [Rule(**rule) for rule in orjson.loads(body)]
                    self.transport.write(_http(200, b"{}"))
                except (TypeError, ValueError) as error:
                    self.transport.write(_http(400, str(error).encode(), "text/plain"))
            case _:
                self.transport.write(_http(404, b'{"detail":"Not Found"}'))

    def _chat(self, head: bytes, body: bytes) -> None:
        server = self.server
        server.requests += 1
        server.under_way += 1
        server.peak_under_way = max(server.peak_under_way, server.under_way)
        request = orjson.loads(body)
        contents = [message["content"] for message in request["messages"]]
        prompt = "\n".join(contents)
        server.count_document(prompt, contents[-1])
        key = server.options.api_key
        if key and f"authorization: bearer {key}".lower().encode() not in head.lower():
            given = head.lower().partition(b"authorization: bearer ")[2].partition(b"\r\n")[0].decode()
            rule: Rule | None = Rule("status", status=401, message=f"Incorrect API key provided: {given}", delay_ms=0)
        else:
            rule = server.fault_for(prompt, request)
        delay = server.options.reply_ms if rule is None or rule.delay_ms is None else rule.delay_ms
        if rule is None:
            reply = _http(200, orjson.dumps(server.completion(request, prompt, None)))
            self.working = asyncio.get_running_loop().call_later(delay / 1000, self._reply, reply)
        else:
            server.faults[f"status {rule.status}" if rule.fault == "status" else rule.fault] += 1
            self.working = asyncio.get_running_loop().call_later(delay / 1000, self._fail, rule, request, prompt)

    def _reply(self, reply: bytes) -> None:
        self.server.replies += 1
        self.transport.write(reply)
        self._done()

    def _done(self) -> None:
        self.working = None
        self.server.under_way -= 1

    def _fail(self, rule: Rule, request: dict[str, Any], prompt: str) -> None:
        whole = orjson.dumps(self.server.completion(request, prompt, rule.fault))
        match rule.fault:
            case "hang":
                self.working = asyncio.get_running_loop().call_later(3600, self._done)
                return
            case "drip":
                self._drip(_http(200, whole))
                return
            case "status":
                extra = f"Retry-After: {rule.retry_after}\r\n" if rule.retry_after is not None else ""
                self.transport.write(_http(rule.status, orjson.dumps({"error": {"message": rule.message}}), extra=extra))
            case "reset":
                sock = self.transport.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.transport.abort()
            case "truncate":
                self.transport.write(_http(200, whole)[: -len(whole) // 2])
                self.transport.close()
            case "malformed":
                self.transport.write(_http(200, whole[:-10] + b"}"))
            case "html":
                self.transport.write(_http(200, b"<html>Welcome to the proxy</html>", "text/html"))
            case _:
                self.transport.write(_http(200, whole))
        self._done()

    def _drip(self, rest: bytes) -> None:
        """Send 40 bytes every 50 ms."""
        self.transport.write(rest[:40])
        if rest[40:]:
            self.working = asyncio.get_running_loop().call_later(0.05, self._drip, rest[40:])
        else:
            self._done()


def _options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--reply-ms", type=float, default=5)
    parser.add_argument("--model", default="scripted")
    parser.add_argument("--thought-in", choices=("reasoning", "reasoning_content", "inline", "content", "parts"), default="reasoning")
    parser.add_argument("--document-pattern", help="regular expression whose first group names the document, for /log")
    parser.add_argument("--api-key", help="what requests must bring, else 401")
    parser.add_argument("--max-tokens", type=int, help="the model's length: 400 above")
    parser.add_argument("--most-at-once", type=int, help="requests under way above which more are refused")
    parser.add_argument("--overload-status", type=int, default=429)
    parser.add_argument("--models-status", type=int, default=200)
    parser.add_argument("--no-usage", action="store_true")
    parser.add_argument("--script", default="[]", help="rules to begin with, as JSON")
    parser.add_argument("--start-delay-s", type=float, default=0, help="listen only then")
    parser.add_argument("--until-stdin-closes", action="store_true", help="end with the process that started this one")
    return parser.parse_args(arguments)


async def _serve(options: argparse.Namespace) -> None:
    await asyncio.sleep(options.start_delay_s)
    loop, end = asyncio.get_running_loop(), asyncio.Event()
    shared = Server(options)
    shared.rules = [Rule(**rule) for rule in orjson.loads(options.script)]
    listener = await loop.create_server(lambda: Connection(shared), "127.0.0.1", options.port, backlog=4096)
    print(orjson.dumps({"port": listener.sockets[0].getsockname()[1]}).decode(), flush=True)
    loop.add_signal_handler(signal.SIGTERM, end.set)
    if options.until_stdin_closes:
        loop.add_reader(0, end.set)
    await end.wait()
    listener.close()


class RunningServer:
    """A server process: its `url` up to and including /v1, which stays the same over `kill` and `start`."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self.port = int(options.pop("port", 0))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        words = [sys.executable, "-m", "tests.support.scripted_server", "--port", str(self.port), "--until-stdin-closes"]
        for name, value in self._options.items():
            flag = f"--{name.replace('_', '-')}"
            words += [flag] if value is True else [flag, value if isinstance(value, str) else orjson.dumps(value).decode()]
        root = Path(__file__).resolve().parents[2]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root, env=os.environ | {"PYTHONPATH": str(root)})
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the scripted server ended before it listened"
        self.port = orjson.loads(line)["port"]

    def kill(self) -> None:
        """End the process at once, as a crash does: connections are reset, further ones refused."""
        if self._process is not None:
            with self._process:  # closes the pipes and waits
                self._process.kill()
        self._process = None

    def script(self, *rules: dict[str, Any]) -> None:
        """Replace the faults; none where no rule is given."""
        request = urllib.request.Request(f"{self.url.removesuffix('/v1')}/script", orjson.dumps(rules), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=10):
            pass

    def log(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.url.removesuffix('/v1')}/log", timeout=10) as reply:
            value: dict[str, Any] = orjson.loads(reply.read())
            return value


@contextlib.contextmanager
def running_server(**options: Any) -> Iterator[RunningServer]:
    """Run a server process in the block. Options are those of the command line: reply_ms=5, script=[{...}], api_key="..."."""
    server = RunningServer(options)
    server.start()
    try:
        yield server
    finally:
        server.kill()


if __name__ == "__main__":
    asyncio.run(_serve(_options()))
