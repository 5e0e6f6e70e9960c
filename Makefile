# make tune: makes the environment, installs, runs the main job: `sparsek-tune run`, with ARGS="--model ... --shape ..."
# make test: makes the environment, installs, runs the linters and every test that needs no GPU
# make test-gpu: the tests that need one

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PYTEST := $(BIN)/python -m pytest -q

.DEFAULT_GOAL := help
.PHONY: help tune test test-gpu lint types unit interpret compile90 clean

help:
	@sed -n 's/^# make/make/p' Makefile

tune: $(VENV)/.installed
	$(BIN)/sparsek-tune run $(ARGS)

test: lint types unit interpret compile90

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The interpreter is named so that the types are those of the packages installed there, whichever python is first on PATH.
types: $(VENV)/.installed-dev
	$(BIN)/pyright --pythonpath $(BIN)/python

# Three processes: Triton decides when it is imported whether it interprets, and one that cross-compiles cannot launch.
unit: $(VENV)/.installed-dev
	$(PYTEST) -m "not gpu and not interpret and not compile90"

interpret: $(VENV)/.installed-dev
	TRITON_INTERPRET=1 $(PYTEST) -m interpret -n auto

compile90: $(VENV)/.installed-dev
	$(PYTEST) -m compile90 -n auto

test-gpu: $(VENV)/.installed-dev
	$(PYTEST) -m gpu

# torch goes first and alone, so that a build that lies on disk is taken; setuptools then builds the package itself.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) setuptools wheel
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(PIP) --no-build-isolation --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.torch pyproject.toml
	$(PIP) --no-build-isolation --editable ".[dev]"
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
