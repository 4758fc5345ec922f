# Each target sets up its own environment (.venv) first: on a fresh clone, `make demo` or `make test` is all there is to type.
# PYTHON=python3.12 chooses the interpreter; ARGS='-k plan -x' goes to pytest; WORKERS is its number of processes.

BIN := .venv/bin
WORKERS ?= 2
export PYTHON

.PHONY: help demo test test-vllm docs lint types format constraints setup setup-dev clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

demo: setup ## both methods on the embedded model, some ten minutes; ends in runs/demo/report.html
	$(BIN)/elision demo

test: setup-dev ## the whole test suite
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile $(ARGS)

test-vllm: ## the plugin in a real vLLM with two CPU workers, in an environment of its own (.venv-vllm, 3.5 GB)
	@scripts/setup_vllm.sh
	.venv-vllm/bin/python -m pytest -o filterwarnings=default tests_vllm $(ARGS)

docs: setup-dev ## the documentation, into site/; a broken link or an unknown name fails
	$(BIN)/mkdocs build --strict --quiet

lint: setup-dev ## style and common mistakes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup-dev ## static types; pyright and its node come from PyPI
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python

format: setup-dev ## rewrite the files as `make lint` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

constraints: ## write constraints.txt anew from what pip resolves today
	$(or $(PYTHON),python3.11) scripts/constraints.py

setup:
	@scripts/setup.sh

setup-dev:
	@scripts/setup.sh dev

clean: ## remove the environment, caches and builds (runs/ stays)
	rm -rf .venv .venv-vllm .pytest_cache .ruff_cache build dist
