"""The OpenAI chat-completions protocol as servers speak it: requests, replies, and whose fault a failure is. Pure functions.

Names of fields: https://platform.openai.com/docs/api-reference/chat; `top_k`, `stop_reason` and `reasoning` are vLLM's,
`reasoning_content` is DeepSeek's, which SGLang, llama.cpp and transformers serve took over.
"""

from __future__ import annotations

import enum
import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import orjson

from tpt_megatron.augment.engines.base import Messages, Reply
from tpt_megatron.config.augment import Sampling

_LONGEST_MESSAGE = 500


class Blame(enum.Enum):
    """Whose fault a failed request is, which decides what follows."""

    SERVER = "server"  # it is down, restarting or has too much to do: tried again, as long as any server answers
    REQUEST = "request"  # it may be this request that breaks it: tried again, `attempts` times
    REFUSED = "refused"  # the server will never take this request
    SETTINGS = "settings"  # the server will never take any: wrong key, model or URL


class Fault(Exception):  # noqa: N818 - caught within the engine
    """A request that failed once. `kind` is a few words to count by, `retry_after_s` what the server asked for."""

    def __init__(self, blame: Blame, kind: str, detail: str = "", retry_after_s: float | None = None) -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.blame = blame
        self.kind = kind
        self.retry_after_s = retry_after_s
        self.is_overload = self.is_time_out = self.is_unreachable = False

    def hide(self, secret: str) -> None:
        """Take `secret` out of the message, in whatever case it stands there."""
        if secret:
            self.args = (re.sub(re.escape(secret), "***", str(self), flags=re.IGNORECASE),)


_SERVER_STATUSES = frozenset((408, 425, 429, 502, 503, 504, 520, 521, 522, 523, 524, 529))
_OVERLOAD_STATUSES = frozenset((408, 429, 503, 504, 524, 529))
_SETTINGS_STATUSES = frozenset((401, 402, 403, 404, 405, 410))


def request_body(model: str, messages: Messages, sampling: Sampling, seed: int) -> bytes:
    """Return the JSON of a request. Keys of `sampling.extra` win over ours."""
    request: dict[str, Any] = {
        "model": model,
        "messages": messages,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_tokens,
        "seed": seed,
    }
    if sampling.top_k is not None:
        request["top_k"] = sampling.top_k
    if sampling.stop:
        request["stop"] = sampling.stop
    request.update(sampling.extra)
    return orjson.dumps(request)


def read_reply(body: bytes, content_type: str, attempts: int) -> Reply:
    """Return what a reply of status 200 says; Fault (of the request) when it is no chat completion."""
    if "json" not in content_type.lower():
        raise Fault(Blame.REQUEST, "wrong content type", f"{content_type or 'none'}, not application/json")
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Fault(Blame.REQUEST, "malformed JSON", str(error)) from None
    try:
        choice = value["choices"][0]
        message = choice["message"]
        usage = value.get("usage") or {}
        return Reply(
            content=_text(message.get("content")),
            reasoning=_text(message.get("reasoning") or message.get("reasoning_content")),
            finish_reason=_as(str, choice.get("finish_reason")),
            stop_reason=_as(str, choice.get("stop_reason")),
            prompt_tokens=_as(int, usage.get("prompt_tokens")),
            generated_tokens=_as(int, usage.get("completion_tokens")),
            model=_as(str, value.get("model")),
            attempts=attempts,
        )
    except (KeyError, IndexError, TypeError, AttributeError):
        raise Fault(Blame.REQUEST, "no choices", f"a reply without choices[0].message: {_shortened(body)}") from None


def _as(kind: type, value: Any) -> Any:
    return value if isinstance(value, kind) else None


def _text(content: Any) -> str | None:
    """Return content that is a string, or a list of parts of which those of type text count."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content if part["type"] == "text")
    return _as(str, content)  # type: ignore[no-any-return]


def fault_of_status(status: int, body: bytes, retry_after: str | None) -> Fault:
    """Return the fault that a status other than 200 stands for, with the server's message."""
    if status in _SERVER_STATUSES:
        blame = Blame.SERVER
    elif status in _SETTINGS_STATUSES or 300 <= status < 400:
        blame = Blame.SETTINGS
    else:
        blame = Blame.REFUSED if status < 500 else Blame.REQUEST
    fault = Fault(blame, f"status {status}", error_message(body), retry_after_s(retry_after, datetime.now(UTC)))
    fault.is_overload = status in _OVERLOAD_STATUSES
    return fault


def error_message(body: bytes) -> str:
    """Return the message of an error reply: where OpenAI, FastAPI and others put it, else the beginning of the body."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        return _shortened(body)
    for key in ("error", "message", "detail"):
        if isinstance(value, dict) and value.get(key):
            value = value[key]
    return value[:_LONGEST_MESSAGE] if isinstance(value, str) else _shortened(body)


def _shortened(body: bytes) -> str:
    return " ".join(body.decode(errors="replace").split())[:_LONGEST_MESSAGE]


def retry_after_s(header: str | None, now: datetime) -> float | None:
    """Return the seconds that a Retry-After header asks for (RFC 9110, 10.2.3: seconds or an HTTP date); None where it says nothing."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(header) - now).total_seconds())
    except (TypeError, ValueError):
        return None


def served_models(body: bytes) -> list[str] | None:
    """Return the names in a reply of GET /models; None where it is no such list."""
    try:
        return [entry["id"] for entry in orjson.loads(body)["data"]]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return None
