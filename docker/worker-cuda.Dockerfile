# Prefill and decode workers with vLLM on NVIDIA GPUs; the torch engine runs there, too.
#
#   docker build -f docker/worker-cuda.Dockerfile -t baton-worker-cuda:0.1.0 .
#
# CUDA's libraries (13.0) come with PyTorch; of the host only the driver is needed, which NVIDIA's container toolkit brings in.
# What pip needs to be told: --secret id=pip,src=pip.conf

ARG PYTHON=3.11.14-slim-bookworm

FROM python:${PYTHON} AS build
WORKDIR /src
COPY pyproject.toml requirements.lock requirements-cuda.lock ./
# what Baton stands on, in a layer that its sources do not change; the list is complete, so nothing is resolved here
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python -m venv /opt/tools \
    && /opt/tools/bin/python -m pip install --no-cache-dir --constraint requirements.lock hatchling \
    && python -m venv /opt/baton \
    && /opt/baton/bin/python -m pip install --no-cache-dir --no-deps --requirement requirements-cuda.lock
COPY README.md LICENSE ./
COPY pipeline pipeline
COPY workers workers
COPY api api
RUN /opt/tools/bin/python -m pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir dist . \
    && /opt/baton/bin/python -m pip install --no-cache-dir --no-deps --no-index dist/*.whl \
    && /opt/baton/bin/python -m pip check \
    && /opt/baton/bin/python -m pip uninstall --yes pip

FROM python:${PYTHON}
LABEL org.opencontainers.image.title="baton-worker-cuda" \
      org.opencontainers.image.description="Baton's prefill and decode workers with vLLM on NVIDIA GPUs" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"
# tini is process 1: it passes signals on and reaps what nobody waits for. gcc stays, alone: Triton compiles the launcher of each kernel
# where it runs. The base image's pip goes, and with it all that could install.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini=0.19.0-1* gcc=4:12.2.0-3* libc6-dev=2.36-9* \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 baton \
    && useradd --uid 10001 --gid 10001 --home-dir /var/lib/baton/cache --no-create-home --shell /usr/sbin/nologin baton \
    && install --directory --owner 10001 --group 10001 /var/lib/baton /var/lib/baton/cache \
    && rm -rf /usr/local/bin/pip* /usr/local/lib/python3.11/ensurepip /usr/local/lib/python3.11/site-packages/*
COPY --from=build /opt/baton /opt/baton
COPY docker/config.toml /etc/baton/config.toml
# What engines compile goes where models are, into the volume: PyTorch's own place for it would be /tmp, which goes with the container.
# FlashInfer's sampler would compile with nvcc at its first use
ENV PATH=/opt/baton/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/var/lib/baton/cache \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    TORCHINDUCTOR_CACHE_DIR=/var/lib/baton/cache/torchinductor \
    TRITON_CACHE_DIR=/var/lib/baton/cache/triton \
    VLLM_NO_USAGE_STATS=1 \
    VLLM_USE_FLASHINFER_SAMPLER=0 \
    BATON_CONFIG=/etc/baton/config.toml
USER 10001:10001
WORKDIR /var/lib/baton
EXPOSE 7447
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s --retries=3 \
    CMD ["sh", "-c", "test -n \"$(find /tmp/baton/ready -newermt '-30 seconds')\""]
ENTRYPOINT ["tini", "--", "baton"]
CMD ["worker", "decode"]
