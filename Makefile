# `make tune`: environment, installation and the main job. `make test`: environment, installation and all tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: tune test lint check clean

tune: $(VENV)/.installed
	$(BIN)/sparsek-tune run $(ARGS)

test: $(VENV)/.installed-dev lint check

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# Three processes: Triton decides at import whether it interprets, and a process that cross-compiles cannot launch.
check:
	$(BIN)/python -m pytest -q -m "not gpu and not interpret and not compile90"
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -m interpret
	$(BIN)/python -m pytest -q -m compile90

$(VENV)/.python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check torch==2.13.0
	touch $@

$(VENV)/.installed: $(VENV)/.python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
