"""Config of a model: the shape of a GPT, spelled out or by the name of a preset."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from tpt_megatron.config.load import Config


class RopeScaling(Config):
    """RoPE stretched to a longer context as Llama 3.1 does it; the names are those of Hugging Face's config.json.

    Wavelengths over original_max_position_embeddings / low_freq_factor are divided by `factor`, those under
    original_max_position_embeddings / high_freq_factor are kept, and those between are blended.
    """

    factor: PositiveFloat
    low_freq_factor: PositiveFloat = 1.0
    high_freq_factor: PositiveFloat = 4.0
    original_max_position_embeddings: PositiveInt = 8192

    @model_validator(mode="after")
    def _factors_differ(self) -> Self:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(f"high_freq_factor={self.high_freq_factor} must be larger than low_freq_factor={self.low_freq_factor}")
        return self


class ExpertsConfig(Config):
    """A mixture of experts in place of every layer's MLP: each token goes to top_k of num_experts, weighed by a softmax over those.

    ffn_hidden_size       of one expert
    aux_loss_coefficient  weight of the loss that asks for an even load (Switch Transformer's); it is in the gradients, not in the reported loss
    """

    num_experts: int = Field(ge=2)
    top_k: PositiveInt
    ffn_hidden_size: PositiveInt
    aux_loss_coefficient: float = Field(1e-3, ge=0)

    @model_validator(mode="after")
    def _enough_experts(self) -> Self:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k} is more than num_experts={self.num_experts}")
        return self


class ModelConfig(Config):
    """A Llama-style GPT: RoPE, RMSNorm, SwiGLU, grouped-query attention.

    preset                takes every value of a known model, qwen3-0.6b for instance, over which those that are given beside it count; a name that is
                          not known is answered with all that are
    vocab_size            0 takes the dataset's tokenizer's size. It is padded to a multiple of vocab_divisor, which
                          tensor_parallel must divide, in the checkpoint, and unpadded on export
    qkv_bias              a bias on query, key and value (Qwen2)
    qk_norm               RMSNorm of each head's query and key (Qwen3)
    mtp_layers            layers that predict tokens further on (multi-token prediction); mtp_loss_weight: of their mean loss, which
                          is in the gradients, not in the reported loss
    init_std              the normal distribution's standard deviation for every matrix; embedding_init_std, when given, for the embedding alone
    """

    further_keys: ClassVar = ("preset",)
    """Keys that are taken, and are no fields."""

    num_layers: PositiveInt
    hidden_size: PositiveInt
    ffn_hidden_size: PositiveInt
    num_heads: PositiveInt
    num_query_groups: PositiveInt
    head_dim: PositiveInt | None = None
    vocab_size: int = Field(0, ge=0)
    vocab_divisor: PositiveInt = 128
    rope_theta: PositiveFloat = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_epsilon: PositiveFloat = 1e-5
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    experts: ExpertsConfig | None = None
    mtp_layers: int = Field(0, ge=0)
    mtp_loss_weight: float = Field(0.1, ge=0)
    init_std: PositiveFloat = 0.02
    embedding_init_std: PositiveFloat | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, values: Any) -> Any:
        if isinstance(values, str):
            values = {"preset": values}
        if not isinstance(values, dict) or "preset" not in values:
            return values
        given = {key: value for key, value in values.items() if key != "preset"}
        preset = PRESETS.get(str(values["preset"]))
        if preset is None:
            raise ValueError(f"preset={values['preset']!r} is not known; known are {', '.join(PRESETS)}")
        return preset | given

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


def _llama(layers: int, hidden: int, ffn: int, heads: int, **others: Any) -> dict[str, Any]:
    shape = {"num_layers": layers, "hidden_size": hidden, "ffn_hidden_size": ffn, "num_heads": heads, "num_query_groups": 8}
    return shape | {"vocab_size": 128_256, "rope_theta": 500_000.0} | others


def _qwen(layers: int, hidden: int, ffn: int, heads: int, groups: int, **others: Any) -> dict[str, Any]:
    shape = {"num_layers": layers, "hidden_size": hidden, "ffn_hidden_size": ffn, "num_heads": heads, "num_query_groups": groups, "head_dim": 128}
    return shape | {"vocab_size": 151_936, "rope_theta": 1_000_000.0, "norm_epsilon": 1e-6} | others


_LLAMA_3_2 = {"tie_embeddings": True, "rope_scaling": {"factor": 32.0}}
_QWEN_2_5_SMALL = _qwen(28, 1536, 8960, 12, 2, qkv_bias=True, tie_embeddings=True)
_QWEN_2_5_7B = _qwen(28, 3584, 18_944, 28, 4, qkv_bias=True, vocab_size=152_064)
_ON_CPU = {"num_layers": 4, "hidden_size": 128, "ffn_hidden_size": 352, "num_heads": 4, "num_query_groups": 2}
PRESETS: dict[str, dict[str, Any]] = {
    "llama-3-8b": _llama(32, 4096, 14_336, 32),
    "llama-3.2-1b": _llama(16, 2048, 8192, 32, **_LLAMA_3_2),
    "llama-3.2-3b": _llama(28, 3072, 8192, 24, **_LLAMA_3_2),
    "qwen2.5-1.5b": _QWEN_2_5_SMALL,
    "qwen2.5-math-1.5b": _QWEN_2_5_SMALL | {"rope_theta": 10_000.0},
    "qwen2.5-7b": _QWEN_2_5_7B,
    "qwen2.5-math-7b": _QWEN_2_5_7B | {"rope_theta": 10_000.0},
    "qwen3-0.6b": _qwen(28, 1024, 3072, 16, 8, qk_norm=True, tie_embeddings=True),
    "qwen3-1.7b": _qwen(28, 2048, 6144, 16, 8, qk_norm=True, tie_embeddings=True),
    "qwen3-4b": _qwen(36, 2560, 9728, 32, 8, qk_norm=True, tie_embeddings=True),
    "qwen3-8b": _qwen(36, 4096, 12_288, 32, 8, qk_norm=True),
    "qwen3-30b-a3b": _qwen(48, 2048, 6144, 32, 4, qk_norm=True, experts={"num_experts": 128, "top_k": 8, "ffn_hidden_size": 768}),
    "cpu-small": _ON_CPU,
    "cpu-experts": _ON_CPU | {"experts": {"num_experts": 8, "top_k": 2, "ffn_hidden_size": 128}},
}
"""Models by name. The published ones are as their config.json has them; rope_scaling is of Llama 3.2 as released, for 131,072 positions."""
