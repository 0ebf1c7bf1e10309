"""From ModelConfig to megatron-core's GPTModel: layer specs for the machine at hand, and the distributed wrapper."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from torch.nn import functional

from tpt_megatron.config.train import ModelConfig, TrainConfig
from tpt_megatron.errors import ConfigError, MachineError
from tpt_megatron.mcore.attention import SdpaCoreAttention


def padded_vocabulary(model: ModelConfig, tensor_parallel: int) -> int:
    """Return the embedding's rows: vocab_size rounded up to a multiple of vocab_divisor x tensor_parallel."""
    multiple = model.vocab_divisor * tensor_parallel
    return -(-model.vocab_size // multiple) * multiple


def transformer_config(config: TrainConfig) -> TransformerConfig:
    """Return megatron-core's config of this model, layout and precision on this machine."""
    model, parallel = config.model, config.parallel
    on_cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.head_size,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=True,
        activation_func=functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.init_std,
        embedding_init_method_std=model.embedding_init_std,
        # Draws whole matrices and cuts them, so that the initial weights do not depend on tensor parallelism.
        use_cpu_initialization=True,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=config.precision == "bf16",
        attention_softmax_in_fp32=True,
        tensor_model_parallel_size=parallel.tensor_parallel,
        pipeline_model_parallel_size=parallel.pipeline_parallel,
        sequence_parallel=parallel.sequence_parallel,
        calculate_per_token_loss=True,
        batch_p2p_sync=on_cuda,
        deallocate_pipeline_outputs=True,
        # megatron-core's fusions are CUDA kernels, or torch.compile, which costs a laptop minutes of start-up.
        masked_softmax_fusion=on_cuda,
        bias_activation_fusion=on_cuda,
        apply_rope_fusion=on_cuda,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with megatron-core's constructor and its mark for sequence parallelism.

    megatron-core's own wrapper refuses sequence parallelism, which needs no more than the mark: the gradients of marked
    weights are summed over the tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def _layer_spec(core: TransformerConfig, attention: str) -> Any:
    if torch.cuda.is_available():
        if attention == "document":
            # Transformer Engine's causal attention would ignore the mask without a word.
            raise ConfigError("data.attention=document is not supported on CUDA yet; set data.attention=sequence")
        try:
            import transformer_engine.pytorch  # noqa: F401
        except ImportError as error:
            raise MachineError(f"training on CUDA needs Transformer Engine, which does not import here: {error}; see docs/architecture.md") from None
        return get_gpt_decoder_block_spec(core, use_transformer_engine=True, normalization="RMSNorm")
    spec = get_gpt_decoder_block_spec(core, use_transformer_engine=False, normalization="RMSNorm")
    spec.layer_norm = RMSNorm
    for layer in spec.layer_specs:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
        layer.submodules.self_attention.submodules.core_attention = SdpaCoreAttention
    return spec


def seed_everything(seed: int) -> None:
    """Seed this rank: pipeline stages differ, so that they draw different weights; tensor-parallel ranks follow megatron-core."""
    stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(stage_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(stage_seed)


def build_model(config: TrainConfig, core: TransformerConfig) -> DistributedDataParallel:
    """Build this rank's part of the model and wrap it for data parallelism. `config.model.vocab_size` must be resolved."""
    assert config.model.vocab_size > 0
    gpt: Any = GPTModel(
        config=core,
        transformer_layer_spec=_layer_spec(core, config.data.attention),
        vocab_size=padded_vocabulary(config.model, config.parallel.tensor_parallel),
        max_sequence_length=config.data.sequence_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=config.model.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=config.model.rope_theta,
        parallel_output=True,
    )
    if torch.cuda.is_available():
        gpt.cuda()
    if config.precision == "bf16":
        gpt = Float16Module(core, gpt)
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=False,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        check_for_nan_in_grad=False,  # the trainer looks at loss and gradient norm, and says it in one line
        bucket_size=None,
    )
    return DistributedDataParallel(config=core, ddp_config=settings, module=gpt)


def count_parameters(model: ModelConfig) -> int:
    """Return the number of parameters of the whole model, vocabulary unpadded."""
    attention = model.hidden_size * model.head_size * (2 * model.num_heads + 2 * model.num_query_groups)
    layer = attention + 3 * model.hidden_size * model.ffn_hidden_size + 2 * model.hidden_size
    embeddings = model.vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2)
    return model.num_layers * layer + embeddings + model.hidden_size
