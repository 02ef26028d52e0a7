# Prefill, decode and embed workers with the torch engine on CPUs.
#
#   docker build -f docker/worker-cpu.Dockerfile -t baton-worker-cpu:0.1.0 --build-arg TORCH_INDEX=... .
#
# TORCH_INDEX is one more index, for PyTorch alone: name PyTorch's index of CPU builds where pip's own would bring the CUDA build
# (gigabytes), which is refused here. What else pip needs to be told: --secret id=pip,src=pip.conf

ARG PYTHON=3.11.14-slim-bookworm

FROM python:${PYTHON} AS build
ARG TORCH_INDEX=
WORKDIR /src
COPY pyproject.toml requirements.lock ./
# what Baton stands on, in layers that its sources do not change; PyTorch first, which is the largest part
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python -m venv /opt/tools \
    && /opt/tools/bin/python -m pip install --no-cache-dir --constraint requirements.lock hatchling \
    && python -m venv /opt/baton \
    && /opt/baton/bin/python -m pip install --no-cache-dir --no-deps ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} \
        "$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' requirements.lock)"
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python -c "import tomllib as t; p = t.load(open('pyproject.toml', 'rb'))['project']; \
print(*p['dependencies'], *p['optional-dependencies']['torch'], sep='\n')" > requirements.txt \
    && /opt/baton/bin/python -m pip install --no-cache-dir --constraint requirements.lock --requirement requirements.txt \
    && /opt/baton/bin/python -c "import torch; torch.version.cuda and exit('this is a CUDA build of PyTorch: set TORCH_INDEX')"
COPY README.md LICENSE ./
COPY pipeline pipeline
COPY workers workers
COPY api api
RUN /opt/tools/bin/python -m pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir dist . \
    && /opt/baton/bin/python -m pip install --no-cache-dir --no-deps --no-index dist/*.whl \
    && /opt/baton/bin/python -m pip check \
    && /opt/baton/bin/python -m pip uninstall --yes pip

FROM python:${PYTHON}
LABEL org.opencontainers.image.title="baton-worker-cpu" \
      org.opencontainers.image.description="Baton's prefill and decode workers with PyTorch on CPUs" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"
# tini is process 1: it passes signals on and reaps what nobody waits for. The base image's pip goes, and with it all that could install.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini=0.19.0-1* \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 baton \
    && useradd --uid 10001 --gid 10001 --home-dir /var/lib/baton/cache --no-create-home --shell /usr/sbin/nologin baton \
    && install --directory --owner 10001 --group 10001 /var/lib/baton /var/lib/baton/cache \
    && rm -rf /usr/local/bin/pip* /usr/local/lib/python3.11/ensurepip /usr/local/lib/python3.11/site-packages/*
COPY --from=build /opt/baton /opt/baton
COPY docker/config.toml /etc/baton/config.toml
ENV PATH=/opt/baton/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/var/lib/baton/cache \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    BATON_CONFIG=/etc/baton/config.toml
USER 10001:10001
WORKDIR /var/lib/baton
EXPOSE 7447
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["sh", "-c", "test -n \"$(find /tmp/baton/ready -newermt '-30 seconds')\""]
ENTRYPOINT ["tini", "--", "baton"]
CMD ["worker", "decode"]
