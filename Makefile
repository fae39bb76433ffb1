# `make demo` and `make test` do all the set-up themselves; nothing but Python 3.11+ is needed.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test test-all lint format bench clean

demo: $(VENV)/installed
	$(BIN)/python -m tools.demo

test: $(VENV)/installed-test
	$(BIN)/python -m pytest

test-all: $(VENV)/installed-test
	$(BIN)/python -m pytest -m ""

lint: $(VENV)/installed-lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/installed-lint
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# BENCH="--data DIR --weights DIR": see docs/benchmarks.md.
bench: $(VENV)/peers
	$(BIN)/python -m benchmarks.bench $(BENCH)

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "cnnft needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/installed-%: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	touch $@

# A peer that wants another torch than the one that is here stays absent.
$(VENV)/peers: $(VENV)/installed
	$(BIN)/python -m pip freeze --exclude-editable > $(VENV)/present.txt
	for peer in fastai ultralytics; do \
	    $(BIN)/python -m pip install --quiet --constraint $(VENV)/present.txt $$peer || echo "$$peer: absent"; done
	touch $@

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache
