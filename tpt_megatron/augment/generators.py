"""What thinks about a document: thoughts that are there already, thoughts that are computed, and models that are asked.

Every thought passes the checks, except the demonstration's worked ones, which are right by construction.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tokenizers import Tokenizer

from tpt_megatron.augment.checks import ThoughtChecks
from tpt_megatron.augment.contamination import ContaminationIndex
from tpt_megatron.augment.engines.base import Engine, Reply, RequestFailed
from tpt_megatron.augment.excerpt import Excerpt, Excerpts, load_counting_tokenizer
from tpt_megatron.augment.outcome import Outcome, Rejection
from tpt_megatron.augment.prompts import Prompt, load_prompts
from tpt_megatron.augment.trajectory import Trajectory, read_trajectory
from tpt_megatron.augment.worked import work_out_text
from tpt_megatron.config.augment import AugmentConfig, FieldGenerator, ModelGenerator, OpenAIGenerator, TransformersGenerator, VllmGenerator, WorkedGenerator
from tpt_megatron.errors import RecordError
from tpt_megatron.records import Document, Thought, extra_name, text_id

Result = TypeVar("Result")


class Generator(Protocol):
    """Thinks about documents, one call each, many under way at once."""

    @property
    def capacity(self) -> int:
        """How many documents it makes sense to have under way now."""
        ...

    async def open(self) -> None:
        """Make ready, in the event loop that will be used."""
        ...

    async def think(self, document: Document, where: str) -> Outcome:
        """Return what came of a document that was read at `where`; RecordError when the record lacks what is needed."""
        ...

    async def close(self) -> None:
        """Release what `open` took."""
        ...

    def notes(self) -> dict[str, Any]:
        """Return what a person may want to see while it runs."""
        ...


class InstantGenerator:
    """Base of generators that compute a thought without waiting for anything."""

    capacity = 64

    async def open(self) -> None:
        """Nothing to do."""

    async def close(self) -> None:
        """Nothing to do."""

    def notes(self) -> dict[str, Any]:
        """Return nothing: there is nothing that could be slow."""
        return {}


class FieldThoughts(InstantGenerator):
    """The generator `field`: the thought that the record brought along, in a field that stays where it is."""

    def __init__(self, field: str, checks: ThoughtChecks) -> None:
        self._field = field
        self._checks = checks

    async def think(self, document: Document, where: str) -> Outcome:
        """Return the field's text as the one thought; RecordError when it is missing, empty or no string."""
        kept_as = extra_name(self._field)
        if kept_as not in document.extra:
            raise RecordError(where, f"field {self._field!r} is missing, and generator.field names it")
        text = document.extra[kept_as]
        if not isinstance(text, str):
            raise RecordError(where, f"field {self._field!r} must be a string, found {'null' if text is None else type(text).__name__}")
        if not text.strip():
            raise RecordError(where, f"field {self._field!r} is empty")
        thought = Thought(text=text, generator=f"field:{self._field}", document_hash=text_id(document.text)[:16])
        fault = self._checks.check(text, document.text, closed=True, refused=False)
        return Outcome(thoughts=(thought,)) if fault is None else Outcome(rejections=(Rejection(*fault, thought),))


class WorkedThoughts(InstantGenerator):
    """The generator `worked`: one thought a document, the worked solution of the problem in its text."""

    async def think(self, document: Document, where: str) -> Outcome:
        """Return the one thought; RecordError when the text is none of the demonstration's problems."""
        text = work_out_text(document.text)
        if text is None:
            raise RecordError(where, "the text is no problem of the demonstration, so generator.kind=worked cannot solve it")
        return Outcome(thoughts=(Thought(text=text, generator="worked", finish_reason="stop", document_hash=text_id(document.text)[:16]),))


class PromptedThoughts:
    """A model that is asked: for each excerpt of a document, with each prompt, so many samples."""

    def __init__(
        self, config: AugmentConfig, generator: ModelGenerator, engine: Engine, prompts: Sequence[Prompt], excerpts: Excerpts, checks: ThoughtChecks
    ) -> None:
        self._config = config
        self._generator = generator
        self._engine = engine
        self._prompts = prompts
        self._excerpts = excerpts
        self._checks = checks
        self._sampling = generator.sampling.model_dump(mode="json", exclude_none=True)
        self._prompt_fields = fields_by_variable(config)

    @property
    def capacity(self) -> int:
        """Return the engine's: a document asks for one request at least."""
        return self._engine.capacity

    async def open(self) -> None:
        """Open the engine."""
        await self._engine.open()

    async def close(self) -> None:
        """Close the engine."""
        await self._engine.close()

    def notes(self) -> dict[str, Any]:
        """Return the engine's."""
        return self._engine.notes()

    async def think(self, document: Document, where: str) -> Outcome:
        """Ask all that is to be asked about one document, at once."""
        identity = text_id(document.text)[:16]
        asked = [
            self._ask(document, identity, excerpt, prompt, sample, where)
            for excerpt in self._excerpts.of(document.text)
            if excerpt.text.strip()  # the last chunk may be a line's end
            for prompt in self._prompts
            for sample in range(self._config.samples)
        ]
        if len(asked) == 1:
            return await asked[0]
        return Outcome.joined(await all_or_none(asked))

    async def _ask(self, document: Document, identity: str, excerpt: Excerpt, prompt: Prompt, sample: int, where: str) -> Outcome:
        """Ask once, or, where an unclosed thought is to be retried, until one closes."""
        checks = self._config.checks
        parts: list[Outcome] = []
        for attempt in range(1 + (checks.retries if checks.unclosed == "retry" else 0)):
            seed = self._seed(identity, excerpt.start, prompt.hash, sample, attempt)
            messages = prompt.render(document, excerpt, self._prompt_fields, seed, where)
            bare = Thought(
                text="",
                generator=self._generator.label,
                revision=self._generator.revision,
                prompt=prompt.name,
                prompt_hash=prompt.hash,
                sample=sample,
                seed=seed,
                sampling=self._sampling,
                document_hash=identity,
                seen_start=excerpt.start,
                seen_end=excerpt.end,
            )
            try:
                reply = await self._engine.complete(messages, self._generator.sampling, seed)
            except RequestFailed as error:
                parts.append(Outcome(rejections=(Rejection("request_failed", str(error), bare),), requests=1))
                break
            trajectory = read_trajectory(reply, self._generator.thought_from, self._generator.sampling.stop)
            parts.append(self._judge(document, bare, reply, trajectory))
            if trajectory.closed:
                break
        return parts[0] if len(parts) == 1 else Outcome.joined(parts)

    def _judge(self, document: Document, bare: Thought, reply: Reply, trajectory: Trajectory) -> Outcome:
        """Check what was read out of a reply."""
        thought = dataclasses.replace(
            bare,
            text=trajectory.text,
            finish_reason=reply.finish_reason,
            tokens=reply.generated_tokens,
            prompt_tokens=reply.prompt_tokens,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            extra={"served_model": reply.model} if reply.model not in (None, self._generator.model) else {},
        )
        fault = self._checks.check(trajectory.text, document.text, closed=trajectory.closed, refused=trajectory.refused)
        return Outcome(
            thoughts=(thought,) if fault is None else (),
            rejections=() if fault is None else (Rejection(*fault, thought),),
            requests=1,
            prompt_tokens=reply.prompt_tokens or 0,
            generated_tokens=reply.generated_tokens or 0,
        )

    def _seed(self, identity: str, start: int, prompt_hash: str, sample: int, attempt: int) -> int:
        """Return the seed of one request, in 31 bits: a hash of all that tells it from the others of the run."""
        parts = (self._config.seed, identity, self._generator.label, prompt_hash, start, sample, attempt)
        return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") >> 1


def fields_by_variable(config: AugmentConfig) -> dict[str, str]:
    """Return the prompt_fields with their record fields under the names that documents keep them by."""
    own = {config.fields.text: "text", config.fields.id: "id", config.fields.source: "source"}
    return {variable: own.get(name, extra_name(name)) for variable, name in config.prompt_fields.items()}


async def all_or_none(asked: Sequence[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Await all; the first failure ends the others and is raised as it is."""
    tasks = [asyncio.ensure_future(one) for one in asked]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def make_engine(config: ModelGenerator, server_log: Path | None = None) -> Engine:
    """Return the engine that a generator's config names. Imports only that engine."""
    match config:
        case OpenAIGenerator():
            from tpt_megatron.augment.engines.openai import OpenAIEngine

            return OpenAIEngine(config, server_log)
        case TransformersGenerator():
            from tpt_megatron.augment.engines.transformers import TransformersEngine

            return TransformersEngine(config)
        case VllmGenerator():
            from tpt_megatron.augment.engines.vllm import VllmEngine

            return VllmEngine(config)
    raise AssertionError(config)


@dataclass(frozen=True)
class Ingredients:
    """What all generators of a config share, read and checked before any work: prompts, counting tokenizers, evaluation sets."""

    config: AugmentConfig
    prompts: list[Prompt]
    tokenizers: dict[str, Tokenizer]
    excerpts: dict[str, Excerpts]
    checks: ThoughtChecks
    contamination_fingerprint: str | None

    @classmethod
    def of(cls, config: AugmentConfig) -> Ingredients:
        """Read them. ConfigError for a template, tokenizer, language or evaluation set that cannot be used."""
        models = [generator for generator in config.generator if isinstance(generator, ModelGenerator)]
        index = None if config.checks.contamination is None else ContaminationIndex(config.checks.contamination)
        counted = config.document_tokens is not None or config.chunks is not None
        # Engines in this process have the tokenizer in the model's folder.
        counters = {generator.label: load_counting_tokenizer(generator.tokenizer or generator.model) for generator in models if counted or generator.tokenizer}
        return cls(
            config=config,
            prompts=load_prompts(config.prompts, config.prompt_fields) if models else [],
            tokenizers=counters,
            excerpts={generator.label: Excerpts(counters.get(generator.label), config.document_tokens, config.chunks) for generator in models},
            checks=ThoughtChecks(config.checks, index),
            contamination_fingerprint=None if index is None else index.fingerprint,
        )

    def settings(self) -> dict[str, Any]:
        """Return all that thoughts depend on: the config's settings, and the contents of the files that it names."""
        return self.config.identity() | {
            "prompts": {prompt.name: prompt.hash for prompt in self.prompts},
            "tokenizers": {label: hashlib.sha256(tokenizer.to_str().encode()).hexdigest()[:16] for label, tokenizer in self.tokenizers.items()},
            "contamination_fingerprint": self.contamination_fingerprint,
        }

    def generators(self, server_log: Path | None = None) -> list[Generator]:
        """Make the generators. `server_log` is where a server that is started writes what it says."""
        made: list[Generator] = []
        for generator in self.config.generator:
            match generator:
                case FieldGenerator(field=field):
                    made.append(FieldThoughts(field, self.checks))
                case WorkedGenerator():
                    made.append(WorkedThoughts())
                case ModelGenerator():
                    engine = make_engine(generator, server_log)
                    made.append(PromptedThoughts(self.config, generator, engine, self.prompts, self.excerpts[generator.label], self.checks))
        return made
