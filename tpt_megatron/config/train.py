"""Config of `tpt train`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from tpt_megatron.config.load import Config


class ModelConfig(Config):
    """A Llama-style GPT: RoPE, RMSNorm, SwiGLU, grouped-query attention, no biases.

    vocab_size 0 takes the dataset's tokenizer's size. It is padded to a multiple of vocab_divisor x tensor_parallel in the
    checkpoint, and unpadded on export. init_std is the normal distribution's standard deviation for every matrix;
    embedding_init_std, when given, for the embedding alone.
    """

    num_layers: PositiveInt
    hidden_size: PositiveInt
    ffn_hidden_size: PositiveInt
    num_heads: PositiveInt
    num_query_groups: PositiveInt
    head_dim: PositiveInt | None = None
    vocab_size: int = Field(0, ge=0)
    vocab_divisor: PositiveInt = 128
    rope_theta: PositiveFloat = 10_000.0
    norm_epsilon: PositiveFloat = 1e-5
    tie_embeddings: bool = False
    init_std: PositiveFloat = 0.02
    embedding_init_std: PositiveFloat | None = None

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        # megatron-core could do without this when head_dim is given; the Hugging Face Llama format, to which it is exported, could not.
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size={self.hidden_size} is not divisible by num_heads={self.num_heads}; change one of them")
        if self.num_heads % self.num_query_groups:
            raise ValueError(f"num_heads={self.num_heads} is not divisible by num_query_groups={self.num_query_groups}")
        if self.head_size % 2:
            raise ValueError(f"head_dim={self.head_size} must be even for RoPE")
        return self

    @property
    def head_size(self) -> int:
        """Channels of one attention head."""
        return self.head_dim if self.head_dim is not None else self.hidden_size // self.num_heads


class ParallelConfig(Config):
    """Ranks along each axis; the data-parallel size is what is left of the world."""

    tensor_parallel: PositiveInt = 1
    pipeline_parallel: PositiveInt = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = True


class DataConfig(Config):
    """Token datasets (prefixes of .bin/.idx) and how documents become sequences.

    attention  document: a token sees its own document only; sequence: everything before it in the sequence
    """

    train: str
    validation: str | None = None
    sequence_length: PositiveInt
    attention: Literal["document", "sequence"] = "document"


class OptimizerConfig(Config):
    """AdamW and its learning-rate schedule; every length in steps."""

    learning_rate: PositiveFloat
    min_learning_rate: float = Field(0.0, ge=0)
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.1, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    epsilon: PositiveFloat = 1e-8
    clip_gradient_norm: float = Field(1.0, ge=0)


class CheckpointConfig(Config):
    """When checkpoints are written: every so many steps, and at the end; every_steps 0 means only at the end.

    load_from  an iter_ folder whose weights and optimizer state a new run starts from
    """

    every_steps: int = Field(0, ge=0)
    load_from: Path | None = None


class TrainConfig(Config):
    """One pretraining run.

    run_dir                 metrics.jsonl, run.json and checkpoints/ go there; a run that is found there is continued
    steps                   optimizer steps in all
    global_batch_sequences  sequences a step, over all ranks
    micro_batch_sequences   sequences a forward pass on one rank
    precision               fp32 or bf16 (about 20 times slower than fp32 on a CPU)
    """

    run_dir: Path
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    steps: PositiveInt
    global_batch_sequences: PositiveInt
    micro_batch_sequences: PositiveInt = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = Field(1234, ge=0)
    validate_every_steps: int = Field(0, ge=0)
    validation_batches: PositiveInt = 1

    @model_validator(mode="after")
    def _layout_fits_model(self) -> Self:
        model, parallel = self.model, self.parallel
        tp, pp = parallel.tensor_parallel, parallel.pipeline_parallel
        for name in ("num_heads", "num_query_groups", "ffn_hidden_size"):
            if getattr(model, name) % tp:
                raise ValueError(f"parallel.tensor_parallel={tp} does not divide model.{name}={getattr(model, name)}")
        if model.num_layers % pp:
            raise ValueError(f"parallel.pipeline_parallel={pp} does not divide model.num_layers={model.num_layers}")
        if parallel.sequence_parallel and tp == 1:
            raise ValueError("parallel.sequence_parallel=true needs parallel.tensor_parallel of at least 2")
        if parallel.sequence_parallel and self.data.sequence_length % tp:
            raise ValueError(f"parallel.tensor_parallel={tp} does not divide data.sequence_length={self.data.sequence_length}, which sequence_parallel needs")
        if self.validate_every_steps and self.data.validation is None:
            raise ValueError("validate_every_steps is set but data.validation names no dataset")
        if self.optimizer.warmup_steps >= self.steps:
            raise ValueError(f"optimizer.warmup_steps={self.optimizer.warmup_steps} must be fewer than steps={self.steps}")
        return self
