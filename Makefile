# `make demo` and `make test` do all the set-up themselves; nothing but Python 3.11+ is needed.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet $(addprefix --constraint ,$(CONSTRAINTS))
# A worker needs up to 2 GB.
PYTEST = $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

.PHONY: demo test test-all test-oldest test-gpu lint format docs bench clean

demo: $(VENV)/installed
	$(BIN)/python -m tools.demo

test: $(VENV)/installed-test
	$(PYTEST)

test-all: $(VENV)/installed-test
	$(PYTEST) -m ""

# With the oldest releases that pyproject.toml allows, in an environment of their own.
test-oldest:
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=tests/oldest.txt

# On a machine with CUDA; installs nothing. GPU="--output docs/gpu.md": see docs/gpu.md.
test-gpu:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m tools.gpu $(GPU)

lint: $(VENV)/installed-lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/installed-lint
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/installed
	$(BIN)/python -m tools.options

# BENCH="--data DIR --weights DIR": see docs/benchmarks.md.
bench: $(VENV)/peers
	$(BIN)/python -m benchmarks.bench $(BENCH)

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "cnnft needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(BIN)/python pyproject.toml $(CONSTRAINTS)
	$(PIP) --editable .
	touch $@

$(VENV)/installed-%: $(VENV)/installed
	$(PIP) --editable ".[$*]"
	touch $@

# A peer that wants another torch than the one that is here stays absent.
$(VENV)/peers: $(VENV)/installed
	$(BIN)/python -m pip freeze --exclude-editable > $(VENV)/present.txt
	for peer in fastai ultralytics; do \
	    $(BIN)/python -m pip install --quiet --constraint $(VENV)/present.txt $$peer || echo "$$peer: absent"; done
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest runs .pytest_cache .mypy_cache .ruff_cache
