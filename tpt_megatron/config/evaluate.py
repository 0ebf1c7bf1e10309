"""Config of `tpt evaluate`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, PositiveInt, field_validator, model_validator

from tpt_megatron.config.load import Config

PACKAGED = ("gsm8k", "math", "mmlu", "mmlu_pro", "boolq")
"""Benchmarks that come with this package; they hide lm-eval's own of the same names."""


class TaskConfig(Config):
    """One way of asking each problem.

    prompt          template over the problem's fields, for example "{problem} <think>"
    answer_pattern  regular expression whose last match's first group in the continuation is the answer; a failed
                    extraction counts as wrong
    """

    prompt: str
    answer_pattern: str
    max_new_tokens: PositiveInt = 128

    @field_validator("answer_pattern")
    @classmethod
    def _one_group(cls, pattern: str) -> str:
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
        if groups < 1:
            raise ValueError(f"{pattern!r} has no group; put parentheses around the answer")
        return pattern


class ThoughtDelimiters(Config):
    """What a thought stands between: `delimiters.open` and `.close` of the dataset that the model was trained on."""

    open: str = Field(min_length=1)
    close: str = Field(min_length=1)


class BenchmarkConfig(Config):
    """One benchmark, run by lm-eval.

    name            gsm8k, math, mmlu, mmlu_pro or boolq, which come with this package and hide lm-eval's own of these names; or any task or group
                    that lm-eval knows
    data            the problems: a JSONL or Parquet file, or a folder of them. Needed for those of this package; an lm-eval task may have it, too
    shots           the examples that stand before each problem, likewise; default: the first ones of data, which are then not asked
    num_shots       how many examples; default: as the paper has it, or as lm-eval's task says
    limit           only the first so many problems; 0: as many as `limit` of the whole config says
    max_new_tokens  default: that of benchmark_options, or what lm-eval's task says
    """

    name: str = Field(min_length=1)
    data: Path | None = None
    shots: Path | None = None
    num_shots: int | None = Field(None, ge=0)
    limit: int = Field(0, ge=0)
    max_new_tokens: PositiveInt | None = None

    @property
    def is_packaged(self) -> bool:
        """Whether it comes with this package."""
        return self.name in PACKAGED

    @model_validator(mode="after")
    def _data_is_given(self) -> Self:
        if self.is_packaged and self.data is None:
            raise ValueError(f"key 'data' is missing: {self.name} is read from local files; give one, or a folder of them")
        if self.shots is not None and self.data is None:
            raise ValueError(f"shots={self.shots} needs data: lm-eval reads the examples from where it reads the problems")
        if self.name == "boolq" and (self.shots is not None or self.num_shots):
            raise ValueError("boolq is asked without examples; remove shots and num_shots")
        if self.shots is not None and self.num_shots == 0:
            raise ValueError(f"shots={self.shots} has no effect with num_shots=0; remove one of them")
        return self


class BenchmarkOptions(Config):
    """How benchmarks are asked.

    backend         transformers: on CPU or one GPU; vllm: where vLLM is installed
    device          of transformers: cpu, cuda, cuda:1, ...; default: a GPU where there is one
    max_new_tokens  of this package's benchmarks; the paper's 2k
    answer_from     anywhere: an answer may stand inside of a thought; outside_thoughts: only what is not thought is read
    thoughts        {open, close}, what a thought stands between: stop texts do not count inside of one. Default: those of the run's datasets, or
                    <think> and </think>
    add_bos_token   whether prompts begin with the tokenizer's BOS: models of this package were trained without
    seed            of whatever is drawn; decoding is greedy unless an lm-eval task asks for sampling
    """

    backend: Literal["transformers", "vllm"] = "transformers"
    device: str | None = None
    max_new_tokens: PositiveInt = 2048
    answer_from: Literal["anywhere", "outside_thoughts"] = "anywhere"
    thoughts: ThoughtDelimiters | None = None
    add_bos_token: bool = False
    seed: int = Field(0, ge=0, lt=1 << 32)

    @model_validator(mode="after")
    def _device_is_of_transformers(self) -> Self:
        if self.device is not None and self.backend == "vllm":
            raise ValueError(f"device={self.device} is for backend=transformers; vLLM takes the GPUs of CUDA_VISIBLE_DEVICES")
        if self.device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise ValueError(f"device={self.device!r} must be cpu, cuda, or cuda: and a number")
        return self


class EvaluateConfig(Config):
    """Score one exported model, or every checkpoint of a run: on held-out problems of your own (tasks), on benchmarks, or both.

    model              a Hugging Face model folder
    run_dir            a training run: every checkpoint in it is exported and scored (give this or model)
    problems           JSONL, for tasks; each record has the prompts' fields and `answer_field`
    tasks              by name: how each of the problems is asked
    benchmarks         a list of {name, data, shots, ...}, run by lm-eval
    benchmark_options  how benchmarks are asked
    output             results as one JSON a checkpoint; default: RUN_DIR/evaluation, or MODEL/evaluation
    batch_size         problems that are asked at once
    limit              only the first so many problems, of each benchmark, too; 0 means all
    """

    model: Path | None = None
    run_dir: Path | None = None
    problems: Path | None = None
    answer_field: str = "answer"
    tasks: dict[str, TaskConfig] = Field(default={})
    benchmarks: tuple[BenchmarkConfig, ...] = ()
    benchmark_options: BenchmarkOptions = BenchmarkOptions()
    output: Path | None = None
    batch_size: PositiveInt = 32
    limit: int = Field(0, ge=0)
    dtype: Literal["float32", "bfloat16"] = "float32"

    @model_validator(mode="after")
    def _one_subject(self) -> Self:
        if (self.model is None) == (self.run_dir is None):
            raise ValueError("give exactly one of model and run_dir")
        return self

    @model_validator(mode="after")
    def _something_is_asked(self) -> Self:
        if not self.tasks and not self.benchmarks:
            raise ValueError("nothing is asked: give tasks, with problems, or benchmarks")
        if bool(self.tasks) != (self.problems is not None):
            raise ValueError("key 'problems' is missing: tasks ask them" if self.tasks else f"problems={self.problems} are asked by no task; give tasks")
        names = [*self.tasks, *(benchmark.name for benchmark in self.benchmarks)]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"benchmarks: {twice!r} is named twice, of benchmarks and tasks together; results go by name")
        if not self.benchmarks and self.benchmark_options != BenchmarkOptions():
            raise ValueError("benchmark_options have no effect without benchmarks")
        if self.tasks and self.benchmark_options.backend == "vllm":
            raise ValueError("benchmark_options.backend=vllm is for benchmarks; give tasks a config of their own")
        return self
