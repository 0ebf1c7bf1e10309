"""The engine `vllm`: vLLM's own asynchronous engine in this process, with continuous batching over one node's GPUs.

Written after vLLM's API documentation and sources for 0.11 to 0.32: `vllm.v1.engine.async_llm.AsyncLLM` (from_engine_args, generate,
shutdown), `vllm.engine.arg_utils.AsyncEngineArgs`, `vllm.sampling_params.SamplingParams` and `RequestOutputKind`, `vllm.inputs.TokensPrompt`,
`vllm.v1.engine.exceptions.EngineDeadError`. Run against 0.32 on CPU: replies, stop texts, cancellation, and the death of the engine.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tpt_megatron.augment.engines.base import Messages, Reply, RequestFailed
from tpt_megatron.augment.engines.chat_template import TEMPLATE_KEY, refuse_other_keys, render_chat, template_variables
from tpt_megatron.config.augment import Sampling, VllmGenerator
from tpt_megatron.errors import ConfigError, MachineError

_OURS = frozenset({"n", "temperature", "top_p", "top_k", "max_tokens", "stop", "seed", "output_kind", "detokenize", "skip_special_tokens"})
"""Fields of SamplingParams that follow from the config or from how replies are read; `sampling.extra` may set any other."""


class VllmEngine:
    """A vLLM engine that lives as long as this object is open, in processes of its own.

    Sampling is what the request says; of the model's generation_config.json vLLM takes the end tokens only. Each request has
    its own random numbers, made from its seed; vLLM promises no equal replies across batches, since rounding differs with them.
    A cancelled request is taken out of the engine. `engine_args` are AsyncEngineArgs' own; the model is the config's.
    """

    def __init__(self, config: VllmGenerator) -> None:
        self._config = config
        self._engine: Any = None
        self._tokenizer: Any = None
        self._engine_is_dead: type[Exception] = Exception
        self._request_is_bad: tuple[type[Exception], ...] = ()
        self._replies = 0

    async def open(self) -> None:
        """Start the engine, which takes minutes for large models.

        Raises MachineError when vLLM is not installed or the engine does not start, ConfigError when it refuses engine_args or sampling, or the
        model has no chat template.
        """
        _import("vllm")
        _sampling_params(self._config.sampling, 0)
        errors = _import("vllm.v1.engine.exceptions")
        self._engine_is_dead = errors.EngineDeadError
        self._request_is_bad = (*_refusals(), errors.EngineGenerateError)
        # In a thread: the worker's own loop must go on telling others that it lives.
        self._engine, self._tokenizer = await asyncio.to_thread(_start, self._config)

    async def complete(self, messages: Messages, sampling: Sampling, seed: int) -> Reply:
        """Return the reply. RequestFailed when the request is refused or fails, MachineError when the engine died."""
        assert self._engine is not None, "complete() before open()"
        prompt = render_chat(self._tokenizer, messages, template_variables(sampling.extra))
        prompt_ids = list(self._tokenizer(prompt.text, add_special_tokens=False).input_ids)
        context = self._engine.vllm_config.model_config.max_model_len
        if len(prompt_ids) + sampling.max_tokens > context:  # vLLM itself would cut the reply short without a word
            raise RequestFailed(
                f"a prompt of {len(prompt_ids)} tokens and max_tokens={sampling.max_tokens} exceed the model's context of {context} tokens; "
                "lower document_tokens or generator.sampling.max_tokens"
            )
        tokens_prompt = _import("vllm.inputs").TokensPrompt(prompt_token_ids=prompt_ids)
        final = None
        try:
            async for output in self._engine.generate(tokens_prompt, _sampling_params(sampling, seed), uuid.uuid4().hex):
                final = output
        except self._engine_is_dead as error:
            raise MachineError(f"the vLLM engine died ({_first_line(error)}); its own messages above say why") from None
        except self._request_is_bad as error:
            raise RequestFailed(f"vLLM gave no reply: {_first_line(error.__cause__ or error)}") from None
        assert final is not None and final.finished, "vLLM ended a request without its final output"
        self._replies += 1
        reply = final.outputs[0]
        return Reply(
            content=prompt.complete(reply.text),
            finish_reason=reply.finish_reason,
            stop_reason=self._stop_text(reply.stop_reason),
            prompt_tokens=len(prompt_ids),
            generated_tokens=len(reply.token_ids),
            model=self._config.model,
        )

    async def close(self) -> None:
        """End the engine and its processes."""
        if self._engine is not None:
            engine, self._engine = self._engine, None
            engine.shutdown()  # in this thread, some seconds: its own task here would take the end for a fault and log it

    @property
    def capacity(self) -> int:
        """The config's `concurrency`: vLLM queues what its memory does not hold."""
        return self._config.concurrency

    def notes(self) -> dict[str, Any]:
        """Return how many replies there were."""
        return {"replies": self._replies}

    def _stop_text(self, stop_reason: int | str | None) -> str | None:
        """Return what ended the reply, as text: vLLM gives the id of a stop token."""
        if isinstance(stop_reason, int):
            return str(self._tokenizer.decode([stop_reason], skip_special_tokens=False))
        return stop_reason


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise MachineError("vllm is not installed; generator.kind=vllm needs it: pip install 'tpt-megatron[vllm]'") from None


def _refusals() -> tuple[type[Exception], ...]:
    """Return what vLLM raises for a request that it refuses: ValueError, in later versions an error of its own beside it."""
    if importlib.util.find_spec("vllm.exceptions") is None:
        return (ValueError,)
    return (ValueError, getattr(_import("vllm.exceptions"), "VLLMClientError", ValueError))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _sampling_params(sampling: Sampling, seed: int) -> Any:
    """Return vLLM's SamplingParams; ConfigError for an extra key or a value that it does not take."""
    module = _import("vllm.sampling_params")
    fields = {name for name in module.SamplingParams.__struct_fields__ if not name.startswith("_")}
    refuse_other_keys(sampling.extra, (fields - _OURS) | {TEMPLATE_KEY}, "the engine vllm")
    template_variables(sampling.extra)
    values = {key: value for key, value in sampling.extra.items() if key != TEMPLATE_KEY}
    if sampling.top_k is not None:
        values["top_k"] = sampling.top_k
    try:
        return module.SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            stop=list(sampling.stop),
            seed=seed % 2**63,
            output_kind=module.RequestOutputKind.FINAL_ONLY,
            skip_special_tokens=False,  # in some models the think tags are special; vLLM leaves the end token out by itself
            **values,
        )
    except Exception as error:  # noqa: BLE001  TypeError, ValueError or an error of vLLM's own, by version
        raise ConfigError(f"generator.sampling: vLLM refuses it ({_first_line(error)})") from None


def _start(config: VllmGenerator) -> tuple[Any, Any]:
    """Return the running engine and the model's tokenizer."""
    if "model" in config.engine_args:
        raise ConfigError("generator.engine_args.model: give the model as generator.model")
    values = {"model": config.model, "disable_log_stats": True} | config.engine_args
    if config.revision is not None and not Path(config.model).is_dir():
        values.setdefault("revision", config.revision)
    arguments = _refused_by(lambda: _import("vllm.engine.arg_utils").AsyncEngineArgs(**values))
    tokenizer = _refused_by(lambda: _load_tokenizer(arguments))
    if not tokenizer.chat_template:
        raise ConfigError(f"generator.model={config.model!r} has no chat template, so it cannot be asked; give a model that was trained to chat")
    engine = _refused_by(lambda: _import("vllm.v1.engine.async_llm").AsyncLLM.from_engine_args(arguments))
    return engine, tokenizer


def _load_tokenizer(arguments: Any) -> Any:
    return _import("transformers").AutoTokenizer.from_pretrained(
        arguments.tokenizer or arguments.model,
        revision=arguments.tokenizer_revision or arguments.revision,
        trust_remote_code=arguments.trust_remote_code,
    )


def _refused_by(step: Callable[[], Any]) -> Any:
    """Return what the step gives; ConfigError for what vLLM calls a wrong value, MachineError for what it could not do."""
    try:
        return step()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"generator.model or generator.engine_args: vLLM refuses them ({_first_line(error)})") from None
    except (OSError, RuntimeError) as error:
        raise MachineError(f"the vLLM engine did not start ({_first_line(error)}); its own messages above say why") from None
