# The API, and the worker that runs batches: Baton without an engine.
#
#   docker build -f docker/api.Dockerfile -t baton-api:0.1.0 .
#
# Where pip needs to be told something (an index of your own, a certificate): --secret id=pip,src=pip.conf

ARG PYTHON=3.11.14-slim-bookworm

FROM python:${PYTHON} AS build
WORKDIR /src
COPY pyproject.toml requirements.lock ./
# what Baton stands on, in a layer that its sources do not change
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python -c "import tomllib as t; p = t.load(open('pyproject.toml', 'rb'))['project']; \
print(*p['dependencies'], *p['optional-dependencies']['s3'], sep='\n')" > requirements.txt \
    && python -m venv /opt/tools \
    && /opt/tools/bin/python -m pip install --no-cache-dir --constraint requirements.lock hatchling \
    && python -m venv /opt/baton \
    && /opt/baton/bin/python -m pip install --no-cache-dir --constraint requirements.lock --requirement requirements.txt
COPY README.md LICENSE ./
COPY pipeline pipeline
COPY workers workers
COPY api api
RUN /opt/tools/bin/python -m pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir dist . \
    && /opt/baton/bin/python -m pip install --no-cache-dir --no-deps --no-index dist/*.whl \
    && /opt/baton/bin/python -m pip check \
    && /opt/baton/bin/python -m pip uninstall --yes pip setuptools

FROM python:${PYTHON}
LABEL org.opencontainers.image.title="baton-api" \
      org.opencontainers.image.description="Baton's HTTP API and batch worker" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"
# tini is process 1: it passes signals on and reaps what nobody waits for. The base image's pip goes, and with it all that could install.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini=0.19.0-1* \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 baton \
    && useradd --uid 10001 --gid 10001 --home-dir /var/lib/baton/cache --no-create-home --shell /usr/sbin/nologin baton \
    && install --directory --owner 10001 --group 10001 /var/lib/baton /var/lib/baton/cache /var/lib/baton/files \
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
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-I", "-S", "-c", \
         "import urllib.request as u; u.build_opener(u.ProxyHandler({})).open('http://127.0.0.1:8000/ready', timeout=4)"]
ENTRYPOINT ["tini", "--", "baton"]
CMD ["api"]
