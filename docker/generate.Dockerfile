# Writing thoughts on NVIDIA GPUs: vLLM's image, with tpt augment in it, which starts vLLM in its own process or asks servers.
#
#   docker build -f docker/generate.Dockerfile -t tpt-megatron:generate .
#   docker run --gpus all --ipc host -v "$PWD":/work tpt-megatron:generate augment augment.yaml
ARG BASE=vllm/vllm-openai:v0.32.0
# hadolint ignore=DL3006
FROM ${BASE}

LABEL org.opencontainers.image.title="tpt_megatron, generation" \
      org.opencontainers.image.description="Thoughts about pretraining documents, by vLLM" \
      org.opencontainers.image.licenses="Apache-2.0"

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONDONTWRITEBYTECODE=1
WORKDIR /opt/tpt_megatron

# vLLM pins its packages, torch and transformers among them, to the version; so no constraints of ours here.
COPY pyproject.toml README.md LICENSE ./
RUN mkdir tpt_megatron && printf '__version__ = "0"\n' > tpt_megatron/__init__.py \
    && python3 -m pip freeze | grep -iE '^(torch|vllm|transformers|numpy)==' > /tmp/constraints.txt \
    && python3 -m pip install --constraint /tmp/constraints.txt --editable '.[generate,chat,s3,sentencepiece]' \
    && rm -r tpt_megatron

COPY tpt_megatron tpt_megatron
COPY docker/entrypoint.sh /usr/local/bin/tpt-entrypoint
RUN python3 -c "from importlib.metadata import version; print(version('vllm'), version('torch'))" && tpt --version

RUN useradd --create-home --uid 10001 tpt && mkdir /work && chown tpt:tpt /work
USER 10001
WORKDIR /work
HEALTHCHECK --interval=5m --timeout=1m --start-period=1m CMD ["tpt", "doctor", "--quick"]
ENTRYPOINT ["tpt-entrypoint"]
CMD ["--help"]
