# One image for every role; docker-compose.yml says which command makes it which.
FROM python:3.11-slim

# Where torch comes from. PyPI's wheels bring CUDA; for a processor: https://download.pytorch.org/whl/cpu
ARG TORCH_INDEX=https://pypi.org/simple

ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 SECATEUR_DATA_DIR=/data HF_HOME=/data/huggingface

WORKDIR /srv/secateur
COPY constraints.txt ./
# torch first and alone: the largest layer, and the one that changes least.
RUN pip install --constraint constraints.txt --extra-index-url ${TORCH_INDEX} torch
COPY pyproject.toml README.md ./
COPY app app
COPY workers workers
COPY migrations migrations
RUN pip install --constraint constraints.txt --extra-index-url ${TORCH_INDEX} .

RUN useradd --create-home --uid 10001 secateur && install --directory --owner secateur /data
USER secateur
WORKDIR /home/secateur
VOLUME /data
