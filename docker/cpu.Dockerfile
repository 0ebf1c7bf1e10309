# Everything on CPUs, from pinned versions: the demonstration, data preparation, conversion, planning.
#
#   docker build -f docker/cpu.Dockerfile -t tpt-megatron:cpu .
#   docker run -v "$PWD":/work tpt-megatron:cpu demo --output demo-output
ARG BASE=python:3.12-slim-bookworm
# hadolint ignore=DL3006
FROM ${BASE} AS build

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /opt/tpt_megatron
COPY pyproject.toml constraints.txt README.md LICENSE ./
# torch's own index has builds without CUDA, a tenth as large.
RUN python -m venv /opt/venv \
    && mkdir tpt_megatron && printf '__version__ = "0"\n' > tpt_megatron/__init__.py \
    && /opt/venv/bin/pip install --constraint constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu --editable '.[all]' \
    && rm -r tpt_megatron

# hadolint ignore=DL3006
FROM ${BASE}
LABEL org.opencontainers.image.title="tpt_megatron, CPU" \
      org.opencontainers.image.description="Thinking-augmented pretraining, small, and all that needs no GPU" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/venv /opt/venv
COPY tpt_megatron /opt/tpt_megatron/tpt_megatron
COPY pyproject.toml README.md LICENSE /opt/tpt_megatron/
COPY docker/entrypoint.sh /usr/local/bin/tpt-entrypoint
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    OMP_NUM_THREADS=1
RUN tpt --version && useradd --create-home --uid 10001 tpt && mkdir /work && chown tpt:tpt /work
USER 10001
WORKDIR /work
HEALTHCHECK --interval=5m --timeout=1m --start-period=1m CMD ["tpt", "doctor", "--quick"]
ENTRYPOINT ["tpt-entrypoint"]
CMD ["--help"]
