# One image for every role of the service; docker-compose.yml names the command and the health check of each role.
# `make test-image` builds the same layout without Docker: it reads the versions, extras, folders and variables from this file.
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS build

# Package indexes, as pip names them. Empty: pip's default. For a CPU-only torch, name the index of its CPU wheels as the extra one.
ARG PIP_INDEX_URL=
ARG PIP_EXTRA_INDEX_URL=
ARG EXTRAS=server,engine,eval,telemetry
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CONSTRAINT=/build/constraints.txt

RUN python -m venv /opt/secateur
WORKDIR /build
COPY constraints.txt ./
# torch is the largest package and changes least, so it has a layer of its own.
RUN /opt/secateur/bin/pip install torch
COPY pyproject.toml MANIFEST.in README.md LICENSE ./
COPY secateur secateur
RUN /opt/secateur/bin/pip wheel --no-deps --wheel-dir dist . \
    && /opt/secateur/bin/pip install "$(echo dist/secateur-*.whl)[${EXTRAS}]"

FROM ${PYTHON_IMAGE}

ENV PATH=/opt/secateur/bin:$PATH PYTHONUNBUFFERED=1
ENV SECATEUR_HOME=/srv/secateur SECATEUR_DATA_DIR=/data HF_HOME=/data/huggingface

RUN useradd --create-home --uid 10001 secateur && install --directory --owner secateur /data
COPY --from=build /opt/secateur /opt/secateur
WORKDIR /srv/secateur
COPY app app
COPY workers workers
COPY migrations migrations
RUN python -m compileall -q .

USER secateur
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 CMD ["python", "-m", "workers", "health", "api"]
CMD ["python", "-m", "uvicorn", "app.main:create_app", "--factory", "--host", "0.0.0.0", "--port", "8000", "--timeout-graceful-shutdown", "5"]
