"""Config of `tpt augment`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from tpt_megatron.config.load import Config, OneOrMore
from tpt_megatron.config.records import InputFields, OnBadRecord
from tpt_megatron.config.slurm import SlurmTime

OutputFormat = Literal["parquet", "jsonl", "jsonl.zst"]


class Sampling(Config):
    """How a model samples. The defaults are those of arXiv 2509.20186: it stops where the thought ends.

    stop   texts that end a reply; extra   further keys of the request, sent as they are, such as chat_template_kwargs
    """

    temperature: float = Field(0.6, ge=0)
    top_p: float = Field(0.9, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    max_tokens: int = Field(8192, ge=1)
    stop: tuple[str, ...] = ("</think>",)
    extra: dict[str, Any] = Field(default_factory=dict)


class FieldGenerator(Config):
    """Thoughts that the records already carry, in `field`."""

    kind: Literal["field"]
    field: str


class WorkedGenerator(Config):
    """Worked solutions of the demonstration's problems, computed from their text."""

    kind: Literal["worked"]


class ModelGenerator(Config):
    """What every generator that asks a model has.

    model         its name at the server, or its folder
    name          how thoughts name it; the model's name where none is given
    revision      of the model, kept with every thought; stated here since servers do not tell it
    tokenizer     the model's tokenizer.json, or a folder that holds one: counts document_tokens and chunks
    thought_from  reasoning: what the model thinks before it answers; content: the answer, for models that do not reason
    """

    model: str
    name: str | None = None
    revision: str | None = None
    tokenizer: str | None = None
    sampling: Sampling = Sampling()
    thought_from: Literal["reasoning", "content"] = "reasoning"

    @property
    def label(self) -> str:
        """The name that thoughts carry."""
        return self.name or self.model


class Concurrency(Config):
    """Requests under way at once, for each server: grows while throughput grows, shrinks on 429, 503 and time-outs."""

    initial: int = Field(32, ge=1)
    maximum: int = Field(512, ge=1)

    @model_validator(mode="after")
    def _initial_fits(self) -> Self:
        if self.initial > self.maximum:
            raise ValueError(f"initial={self.initial} is larger than maximum={self.maximum}")
        return self


class ServerCommand(Config):
    """A server that each worker starts for itself and ends with itself.

    command          its words; {port} stands for a free port
    start_timeout_s  how long it may take to answer
    """

    command: tuple[str, ...] = Field(min_length=1)
    start_timeout_s: float = Field(1800, gt=0)


class OpenAIGenerator(ModelGenerator):
    """Any server of the OpenAI chat-completions protocol: vLLM, SGLang, TGI, llama.cpp, transformers serve, hosted ones.

    base_urls       one or several, up to and including /v1; requests go to the one with most room
    server          or a server that each worker starts for itself
    api_key_env     the environment variable that holds the key; the key is never logged or stored
    timeout_s       for one request, from sending to the last byte
    attempts        for one request, before it is given up while others succeed
    outage_limit_s  how long no server may answer before the run ends; finished work stays
    """

    kind: Literal["openai"]
    base_urls: OneOrMore = ()
    server: ServerCommand | None = None
    api_key_env: str = "OPENAI_API_KEY"
    timeout_s: float = Field(1800, gt=0)
    attempts: int = Field(6, ge=1)
    outage_limit_s: float = Field(600, ge=0)
    concurrency: Concurrency = Concurrency()

    @model_validator(mode="after")
    def _has_a_server(self) -> Self:
        if bool(self.base_urls) == (self.server is not None):
            raise ValueError("give either base_urls=[http://host:port/v1, ...] or server.command=[...]")
        for url in self.base_urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"base_urls: {url!r} is no URL; write http://host:port/v1")
        return self


class TransformersGenerator(ModelGenerator):
    """A Hugging Face model folder, in this process, in batches: for small models and machines without a server."""

    kind: Literal["transformers"]
    device: str = "auto"
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    batch_size: int = Field(8, ge=1)


class VllmGenerator(ModelGenerator):
    """vLLM's engine in this process, for one node with GPUs. `engine_args` are its own, such as tensor_parallel_size."""

    kind: Literal["vllm"]
    engine_args: dict[str, Any] = Field(default_factory=dict)
    concurrency: int = Field(512, ge=1)


SomeGenerator = Annotated[
    FieldGenerator | WorkedGenerator | OpenAIGenerator | TransformersGenerator | VllmGenerator,
    Field(discriminator="kind"),
]


def _tuple_of_one_generator(value: Any) -> Any:
    return (value,) if isinstance(value, (dict, Config)) else value


class Chunks(Config):
    """Thinking chunk by chunk: each chunk of `tokens` gets thoughts of its own, which see up to `before_tokens` of what precedes it."""

    tokens: int = Field(512, ge=16)
    before_tokens: int = Field(1536, ge=0)


class Contamination(Config):
    """Evaluation sets that no thought may repeat: `words` words in a row that stand in any of `files` reject it.

    files   JSONL or Parquet files; fields: their fields to compare with, all that are text where none are named
    """

    files: OneOrMore
    fields: tuple[str, ...] = ()
    words: int = Field(13, ge=4)


class Checks(Config):
    """What is done before a thought is believed. A limit of null switches a check off.

    unclosed        a thought that hit the limit before it ended: drop it, keep it, or retry with another seed
    retries         how often, under unclosed=retry; then it is dropped
    min_characters  a shorter thought counts as empty
    max_repeated    share of its 8-word runs that are repetitions of earlier ones, above which a thought loops
    max_copied      share of its 13-word runs that stand in the document, above which it is a copy
    refusals        patterns (regular expressions, case ignored) of which one in the first 300 characters is a refusal
    delimiters      texts that a thought must not contain, since preprocessing sets thoughts apart by them
    language        same: that of the document; or a code such as en; null: not checked
    """

    unclosed: Literal["drop", "keep", "retry"] = "drop"
    retries: int = Field(2, ge=1)
    min_characters: int = Field(1, ge=1)
    max_repeated: float | None = Field(0.5, ge=0, lt=1)
    max_copied: float | None = Field(0.5, ge=0, lt=1)
    refusals: tuple[str, ...] = (
        r"\bI(?:'m| am) sorry,? but I (?:can(?:'|no)t|am (?:unable|not able))",
        r"\bI(?:'m| am) (?:unable|not able) to (?:help|assist|comply|fulfil|provide)",
        r"\bI can(?:'|no)t (?:help (?:you|with)|assist|comply|fulfil|provide)",
        r"\bas an AI(?: language model)?,? I (?:can(?:'|no)t|am (?:unable|not able))",
    )
    delimiters: tuple[str, ...] = ("<think>", "</think>")
    language: str | None = None
    contamination: Contamination | None = None


class ShardSize(Config):
    """A shard ends at the first of these limits. A document is never cut: a larger one is a shard of its own."""

    documents: int = Field(1000, ge=1)
    megabytes: float = Field(16, gt=0)


class Slurm(Config):
    """A Slurm array whose tasks are workers, submitted through datatrove (the extra `scale`).

    tasks    workers, each with the resources below; time: limit of a task, HH:MM:SS
    setup    shell commands that make the environment on the node, such as `source /venv/bin/activate`
    logs     folder for the job script and the tasks' output, on a disk that nodes share
    sbatch   further sbatch options by name
    """

    tasks: int = Field(ge=1)
    time: SlurmTime
    partition: str
    logs: Path
    cpus_per_task: int = Field(4, ge=1)
    memory_per_cpu_gb: int = Field(4, ge=1)
    gpus_per_task: int = Field(0, ge=0)
    qos: str | None = None
    setup: str = ""
    sbatch: dict[str, str | int] = Field(default_factory=dict)


class Cost(Config):
    """What the generation costs, for estimates and reports: by GPU-hour or by token; state what applies.

    tokens_per_second_per_gpu  generated tokens, as measured or published for the model and the GPU
    gpus                       GPUs at work at once
    thought_tokens             tokens of one thought, where no --sample run says it
    overhead                   wall time over engine time; 2.3 was seen in production
    """

    tokens_per_second_per_gpu: float | None = Field(None, gt=0)
    gpus: int = Field(1, ge=1)
    per_gpu_hour: float | None = Field(None, ge=0)
    per_million_prompt_tokens: float | None = Field(None, ge=0)
    per_million_generated_tokens: float | None = Field(None, ge=0)
    currency: str = "USD"
    thought_tokens: float | None = Field(None, gt=0)
    overhead: float = Field(1.0, ge=1)


_SERVER_KEYS = ("base_urls", "server", "api_key_env", "timeout_s", "attempts", "outage_limit_s", "concurrency")


class AugmentConfig(Config):
    """Documents in, documents with thoughts out. Every generator, prompt and sample gives a document one thought more.

    input            .jsonl, .jsonl.gz, .jsonl.zst and .parquet files, folders of them, or globs; local, or s3://... and the like
    output           folder, local or remote, for shards of augmented documents and `manifest.json`
    format           of the shards
    prompts          names (expert, focus, back_thinking) or template files; see `tpt_megatron.augment.prompts`
    prompt_fields    variables for templates, and the record fields that fill them
    samples          thoughts by each generator and prompt
    document_tokens  the part of a document that a prompt shows; null: all of it
    chunks           think about a document chunk by chunk instead
    seed             from which each request's own seed is made
    keep_rejected    write rejected thoughts to `rejected/`, for reading
    difficulty_field a field to group the statistics by
    on_bad_record    set_aside: write it to the output's `bad/`, count it, go on; fail: stop at the first
    max_record_megabytes  a larger record is a bad one
    workers          processes on this machine; more machines may run the same command on the same output
    slurm            submit workers to Slurm instead
    grace_s          after SIGTERM, how long requests under way may take to finish
    flush_s          how often finished thoughts of unfinished shards are saved; a killed run repeats what it finished since
    claim_timeout_s  a worker of another machine that was silent for so long is taken for dead
    """

    input: OneOrMore
    output: str
    format: OutputFormat = "parquet"
    generator: Annotated[tuple[SomeGenerator, ...], BeforeValidator(_tuple_of_one_generator), Field(min_length=1)]
    prompts: OneOrMore = ("expert",)
    prompt_fields: dict[str, str] = Field(default_factory=lambda: {"question": "question", "answer": "answer"})
    samples: int = Field(1, ge=1)
    document_tokens: int | None = Field(2048, ge=16)
    chunks: Chunks | None = None
    seed: int = 0
    checks: Checks = Checks()
    keep_rejected: bool = True
    fields: InputFields = InputFields()
    difficulty_field: str | None = None
    on_bad_record: OnBadRecord = "set_aside"
    max_record_megabytes: float = Field(8, gt=0)
    shard: ShardSize = ShardSize()
    workers: int = Field(1, ge=1)
    slurm: Slurm | None = None
    grace_s: float = Field(25, ge=0)
    flush_s: float = Field(10, gt=0)
    claim_timeout_s: float = Field(120, gt=0)
    cost: Cost = Cost()

    @model_validator(mode="before")
    @classmethod
    def _output_may_be_a_path(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("output"), Path):
            return values | {"output": str(values["output"])}
        return values

    @model_validator(mode="after")
    def _thoughts_are_not_the_document(self) -> Self:
        taken = (self.fields.text, self.fields.id, self.fields.source, "thoughts")
        for generator in self.generator:
            if isinstance(generator, FieldGenerator) and generator.field in taken:
                raise ValueError(
                    f"generator.field={generator.field!r} is already the document's own text, id, source or list of thoughts; "
                    "name the field that holds the thought"
                )
        return self

    @model_validator(mode="after")
    def _names_are_distinct(self) -> Self:
        labels = [generator.label for generator in self.generator if isinstance(generator, ModelGenerator)]
        if len(set(labels)) != len(labels):
            raise ValueError(f"generator: {labels} must have different names; give each a name")
        if not self.prompts or len(set(self.prompts)) != len(self.prompts):
            raise ValueError(f"prompts={list(self.prompts)} must name at least one prompt, and each once")
        return self

    @model_validator(mode="after")
    def _tokens_can_be_counted(self) -> Self:
        if self.document_tokens is None and self.chunks is None:
            return self
        for generator in self.generator:
            if isinstance(generator, OpenAIGenerator) and generator.tokenizer is None:
                raise ValueError(
                    f"generator {generator.label}: tokenizer is missing, which counts document_tokens and chunks; "
                    "give the model's tokenizer.json or its folder, or document_tokens=null to show whole documents"
                )
        return self

    def identity(self) -> dict[str, Any]:
        """Return the settings that thoughts depend on: an output holds results of one such set. Where servers stand is none of it."""
        operation = {"input", "output", "on_bad_record", "workers", "slurm", "grace_s", "flush_s", "claim_timeout_s", "cost"}
        values = self.model_dump(mode="json", exclude=operation | {"prompts"})
        if values["checks"]["contamination"] is not None:
            del values["checks"]["contamination"]["files"]  # what is in them counts, not where they lie; so it is for prompts
        for generator in values["generator"]:
            for key in (*_SERVER_KEYS, "tokenizer", "batch_size", "device"):
                generator.pop(key, None)
        return values
