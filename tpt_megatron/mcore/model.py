"""From ModelConfig to megatron-core's GPTModel: layer specs for the machine at hand, and the distributed wrapper."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from torch.nn import functional

from tpt_megatron.config.model import ModelConfig, RopeScaling
from tpt_megatron.config.train import TrainConfig
from tpt_megatron.errors import ConfigError
from tpt_megatron.mcore.attention import SdpaCoreAttention
from tpt_megatron.mcore.machine import FP8_FORMATS


def padded_vocabulary(model: ModelConfig, tensor_parallel: int) -> int:
    """Return the embedding's rows: vocab_size rounded up to a multiple of vocab_divisor, whatever the layout, so that weights are drawn alike.

    ConfigError where tensor-parallel ranks cannot have equal parts of them.
    """
    rows = -(-model.vocab_size // model.vocab_divisor) * model.vocab_divisor
    if rows % tensor_parallel:
        raise ConfigError(
            f"parallel.tensor_parallel={tensor_parallel} does not divide the {rows} rows of the padded vocabulary; make model.vocab_divisor="
            f"{model.vocab_divisor} a multiple of it"
        )
    return rows


class PaddedGPTModel(GPTModel):  # type: ignore[misc]
    """megatron-core's GPT, whose loss is over the vocabulary alone: as it stands it would give probability to the rows that pad it."""

    real_vocabulary: int

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Return the losses [b, s] of labels [b, s] and logits [s, b, padded vocabulary/tp]."""
        rows = logits.size(-1)
        first_padded = max(0, self.real_vocabulary - parallel_state.get_tensor_model_parallel_rank() * rows)
        if first_padded < rows:
            # A probability of 0, and so no gradient. Not -inf, of which Transformer Engine's kernel makes nan where all rows of a rank are padding.
            logits.detach()[..., first_padded:] = torch.finfo(logits.dtype).min
        if logits.is_cuda:
            return fused_cross_entropy(labels, logits)
        return super().compute_language_model_loss(labels, logits)  # type: ignore[no-any-return]


def fused_cross_entropy(labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Return the losses [b, s], fp32, of labels [b, s] and logits [s, b, padded vocabulary/tp] on CUDA. The logits are overwritten by their gradient.

    It is Transformer Engine's kernel. megatron-core's own makes fp32 copies of the logits; and its way of calling this one has the host wait for the
    GPU in every backward pass, to see whether the loss's gradient is 1.
    """
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    # In one dimension: the kernel goes by strides, and that of a dimension of one micro-batch may be anything.
    rows, labels = logits.flatten(0, 1)[None], labels.t().flatten()
    losses: torch.Tensor = parallel_cross_entropy(rows, labels, dist_process_group=parallel_state.get_tensor_model_parallel_group(), is_cg_capturable=True)
    return losses.view(logits.shape[:2]).t().contiguous()


def transformer_config(config: TrainConfig) -> TransformerConfig:
    """Return megatron-core's config of this model, layout and precision on this machine."""
    model, parallel = config.model, config.parallel
    on_cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    is_interleaved = parallel.virtual_pipeline > 1
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
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.init_std,
        embedding_init_method_std=model.embedding_init_std,
        use_cpu_initialization=_draws_on_cpu(config, on_cuda=on_cuda),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=config.precision == "bf16",
        attention_softmax_in_fp32=True,
        tensor_model_parallel_size=parallel.tensor_parallel,
        pipeline_model_parallel_size=parallel.pipeline_parallel,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if is_interleaved else None,
        context_parallel_size=parallel.context_parallel,
        expert_model_parallel_size=parallel.expert_parallel,
        sequence_parallel=parallel.sequence_parallel,
        calculate_per_token_loss=True,
        # The interleaved schedule needs these two, and on gloo the third: else it trains on other gradients, without a word.
        overlap_p2p_comm=is_interleaved,
        batch_p2p_comm=not is_interleaved,
        deallocate_pipeline_outputs=on_cuda or not is_interleaved,
        batch_p2p_sync=on_cuda,
        **_expert_settings(config, on_cuda=on_cuda),
        **_recompute_settings(config.recompute),
        **_fp8_settings(config),
        mtp_num_layers=model.mtp_layers or None,
        mtp_loss_scaling_factor=model.mtp_loss_weight,
        # megatron-core's fusions are CUDA kernels; on a CPU cpu_kernels.py has the last two. The loss's is in PaddedGPTModel.
        masked_softmax_fusion=on_cuda,
        apply_rope_fusion=on_cuda,
        bias_activation_fusion=on_cuda or model.experts is None,
        gradient_accumulation_fusion=True,
        persist_layer_norm=False,
    )


def _draws_on_cpu(config: TrainConfig, *, on_cuda: bool) -> bool:
    """Say whether weights are drawn on the CPU: whole matrices, which are cut, so that they do not depend on tensor parallelism.

    Transformer Engine's experts are not cut but drawn as each rank has them, which gives all ranks the same ones from the CPU's one seed;
    and what is to be FP8 from the beginning is quantized where it is drawn, which only a GPU can.
    """
    return not (on_cuda and (config.model.experts is not None or config.fp8_parameters))


def gathers_in_bf16(config: TrainConfig) -> bool:
    """Say whether parameters are gathered over data-parallel ranks in bf16 and quantized then: MXFP8 ones, which cannot lie in a common buffer."""
    return config.fp8 == "mxfp8" and config.fp8_parameters


def _expert_settings(config: TrainConfig, *, on_cuda: bool) -> dict[str, Any]:
    experts, parallel = config.model.experts, config.parallel
    if experts is None:
        return {}
    # megatron-core 0.16.1 weighs this loss by the tokens of one rank, where it should by those of all that share a sequence.
    sharing = parallel.context_parallel * (parallel.tensor_parallel if parallel.sequence_parallel else 1)
    return {
        "num_moe_experts": experts.num_experts,
        "moe_router_topk": experts.top_k,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": experts.aux_loss_coefficient * sharing,
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": on_cuda,
    }


def _fp8_settings(config: TrainConfig) -> dict[str, Any]:
    if config.fp8 == "none":
        return {}
    return {"fp8": FP8_FORMATS[config.fp8], "fp8_recipe": config.fp8, "fp8_param": config.fp8_parameters}


def _recompute_settings(recompute: str) -> dict[str, Any]:
    """`selective` computes core attention anew in the backward pass, `full` whole layers, of which only the inputs are kept."""
    if recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return {} if recompute == "none" else {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with megatron-core's constructor and its mark for sequence parallelism.

    megatron-core's own wrapper refuses sequence parallelism, which needs no more than the mark: the gradients of marked
    weights are summed over the tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def _block_spec(core: TransformerConfig, stage: int | None) -> Any:
    if torch.cuda.is_available():
        return get_gpt_decoder_block_spec(core, use_transformer_engine=True, normalization="RMSNorm", vp_stage=stage)
    spec = get_gpt_decoder_block_spec(core, use_transformer_engine=False, normalization="RMSNorm", vp_stage=stage)
    spec.layer_norm = RMSNorm
    for layer in spec.layer_specs:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
        attention_modules = layer.submodules.self_attention.submodules
        attention_modules.core_attention = SdpaCoreAttention
        if core.num_moe_experts:  # the norm has on disk the name that Transformer Engine's layers give it; layers share submodules
            layer.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
        if core.qk_layernorm:
            attention_modules.q_layernorm = attention_modules.k_layernorm = RMSNorm
    return spec


def _mtp_spec(core: TransformerConfig, block_spec: Any, stage: int | None) -> Any:
    """Return the spec of the layers for multi-token prediction, None where this rank's part of the model has none."""
    if not core.mtp_num_layers:
        return None
    on_cuda = torch.cuda.is_available()
    spec = get_gpt_mtp_block_spec(core, block_spec, use_transformer_engine=on_cuda, vp_stage=stage)
    if spec is not None and not on_cuda:
        for layer in spec.layer_specs:
            layer.submodules.enorm = layer.submodules.hnorm = layer.submodules.layer_norm = RMSNorm
    return spec


def seed_everything(seed: int) -> None:
    """Seed this rank: pipeline stages differ, so that they draw different weights; tensor-parallel ranks follow megatron-core."""
    stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(stage_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(stage_seed)


def build_model(config: TrainConfig, core: TransformerConfig) -> list[DistributedDataParallel]:
    """Build this rank's part of the model, wrapped for data parallelism: a chunk for each virtual pipeline stage.

    `config.model.vocab_size` must be resolved.
    """
    assert config.model.vocab_size > 0
    chunks = config.parallel.virtual_pipeline
    return [_build_chunk(config, core, number if chunks > 1 else None) for number in range(chunks)]


def _build_chunk(config: TrainConfig, core: TransformerConfig, stage: int | None) -> DistributedDataParallel:
    model, parallel = config.model, config.parallel
    block_spec = _block_spec(core, stage)
    gpt: Any = PaddedGPTModel(
        config=core,
        transformer_layer_spec=block_spec,
        vocab_size=padded_vocabulary(model, parallel.tensor_parallel),
        max_sequence_length=config.data.sequence_length,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
        share_embeddings_and_output_weights=model.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=model.rope_theta,
        parallel_output=True,
        mtp_block_spec=_mtp_spec(core, block_spec, stage),
        vp_stage=stage,
    )
    gpt.real_vocabulary = model.vocab_size
    if model.rope_scaling is not None:
        # megatron-core would take the factor alone, and Llama 3.1's other numbers for granted.
        gpt.rotary_pos_emb.inv_freq = scaled_frequencies(gpt.rotary_pos_emb.inv_freq, model.rope_scaling)
    if torch.cuda.is_available():
        gpt.cuda()
    if config.precision == "bf16":
        gpt = Float16Module(core, gpt)
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.distributed_optimizer,
        fp8_param_gather=config.fp8_parameters,
        reuse_grad_buf_for_mxfp8_param_ag=gathers_in_bf16(config),
        check_for_nan_in_grad=False,  # the trainer looks at loss and gradient norm, and says it in one line
        bucket_size=40_000_000 if parallel.overlap_grad_reduce else None,
    )
    return DistributedDataParallel(config=core, ddp_config=settings, module=gpt, disable_bucketing=bool(stage))


def scaled_frequencies(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Return RoPE's frequencies, [head_size / 2] in radians a position, stretched as RopeScaling says."""
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)  # within the original context
    kept = ((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def count_parameters(model: ModelConfig) -> int:
    """Return the number of parameters of the whole model, vocabulary unpadded; of all experts, and without layers for multi-token prediction."""
    rows = model.num_heads + 2 * model.num_query_groups
    attention = model.hidden_size * model.head_size * (rows + model.num_heads)
    attention += rows * model.head_size if model.qkv_bias else 0
    attention += 2 * model.head_size if model.qk_norm else 0
    experts = model.experts
    one_mlp = 3 * model.hidden_size * (model.ffn_hidden_size if experts is None else experts.ffn_hidden_size)
    mlp = one_mlp if experts is None else experts.num_experts * (one_mlp + model.hidden_size)
    embeddings = model.vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2)
    return model.num_layers * (attention + mlp + 2 * model.hidden_size) + embeddings + model.hidden_size
