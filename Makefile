# Everything a fresh machine needs: Python 3.11+, make and a C compiler.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.installed
LINTER := $(VENV)/checkov/.installed
# Processes that run tests side by side; each test may start several of its own. On a machine that is too busy for the
# deadlines of such a test it gets a second try, and the summary names it.
TEST_WORKERS ?= 2

.PHONY: help train evaluate test matrix lint recall clean
help:  ## What can be made
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

train: $(READY)  ## Train a small Titans model: prepare, train, kill, resume, evaluate
	$(BIN)/titans-dist quickstart

evaluate: $(READY)  ## After `make train`: small offline suites on its checkpoint with 2 Ray workers, and a report, 10 minutes at most
	$(BIN)/titans-dist evaluate suite=offline

test: $(READY) $(LINTER) lint  ## Check the code and run the test suite, but for the whole matrix of models and layouts
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --no-loadscope-reorder --reruns 1 -m "not matrix" --durations=20

matrix: $(READY)  ## Every model on every layout equals one process: 20 minutes at most
	$(BIN)/python -m pytest tests/parallel -m matrix

recall: $(READY)  ## Which models recall what lies beyond the reach of attention: a table and a plot, 30 minutes at most
	$(BIN)/python benchmarks/recall.py

lint: $(READY)  ## Format, style, types and import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# torch comes first and by itself: nothing after it can then pull another build. See install-torch.
$(READY): pyproject.toml constraints.txt install-torch
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24" "setuptools>=77" wheel
	./install-torch $(BIN)/python
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[all,test]"
	$(BIN)/python -m pip check
	@touch $@

# The linter of pods: its pins do not agree with ours, so it has an environment of its own.
$(LINTER): $(READY) tests/k8s/checkov.txt
	$(PYTHON) -m venv $(VENV)/checkov
	$(VENV)/checkov/bin/python -m pip install --quiet --requirement tests/k8s/checkov.txt
	@touch $@

clean:  ## Remove the virtual environment and caches; data and runs stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache *.egg-info
