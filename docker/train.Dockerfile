# Training on NVIDIA GPUs: NVIDIA's PyTorch image, whose torch, NCCL and Transformer Engine stay as they are, and megatron-core pinned over it.
#
#   docker build -f docker/train.Dockerfile -t tpt-megatron:train .
#   docker run --gpus all --ipc host --ulimit memlock=-1 --ulimit stack=67108864 -v "$PWD":/work tpt-megatron:train train train.yaml
#
# Another base: --build-arg BASE=nvcr.io/nvidia/pytorch:25.11-py3, say. It has to have a Transformer Engine from 2.9 to below 2.12.
ARG BASE=nvcr.io/nvidia/pytorch:26.02-py3
# hadolint ignore=DL3006
FROM ${BASE}

LABEL org.opencontainers.image.title="tpt_megatron, training" \
      org.opencontainers.image.description="Thinking-augmented pretraining on megatron-core and Transformer Engine" \
      org.opencontainers.image.licenses="Apache-2.0"

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# The base pins packages by a constraint of its own, which would refuse ours; what belongs to the base is left out of ours instead.
ENV PIP_CONSTRAINT="" \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONDONTWRITEBYTECODE=1

WORKDIR /opt/tpt_megatron

# What is needed changes less often than the code: its layer comes first, and is kept.
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN grep -viE '^(torch|triton|numpy|transformer-engine|nvidia-)' constraints.txt > /tmp/constraints.txt \
    && mkdir tpt_megatron && printf '__version__ = "0"\n' > tpt_megatron/__init__.py \
    && python -m pip install --constraint /tmp/constraints.txt --editable '.[train,evaluate,report,tensorboard,wandb,s3,sentencepiece,chat]' \
    && rm -r tpt_megatron

COPY tpt_megatron tpt_megatron
COPY docker/entrypoint.sh /usr/local/bin/tpt-entrypoint

# A build in which a dependency took the base's torch or Transformer Engine away ends here and not on the cluster.
RUN python -c "import torch, transformer_engine, megatron.core; assert torch.version.cuda, 'the CUDA build of torch is gone'; print(torch.__version__, transformer_engine.__version__, megatron.core.__version__)" \
    && tpt --version

# One connection keeps the order of kernels that megatron-core's overlaps need; the allocator's segments may grow, so that less is lost between them.
ENV CUDA_DEVICE_MAX_CONNECTIONS=1 \
    PYTORCH_ALLOC_CONF=expandable_segments:True \
    TORCH_NCCL_ASYNC_ERROR_HANDLING=1 \
    NCCL_IB_TIMEOUT=22 \
    NCCL_IB_RETRY_CNT=7 \
    OMP_NUM_THREADS=1

RUN useradd --create-home --uid 10001 tpt && mkdir /work && chown tpt:tpt /work
USER 10001
WORKDIR /work
HEALTHCHECK --interval=5m --timeout=1m --start-period=1m CMD ["tpt", "doctor", "--quick"]
ENTRYPOINT ["tpt-entrypoint"]
CMD ["--help"]
