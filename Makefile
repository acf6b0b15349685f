# The commands of the README. Each makes the virtual environment it needs, once.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
PINNED := -c constraints.txt
# The suite is made of small arrays: threads within a test only get in each other's way.
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint format clean

help:
	@echo "make demo       train a CNN on MNIST by Jacobian descent (3 minutes)"
	@echo "make test       lint, then the whole test suite (12 minutes)"
	@echo "make test-slow  the exhaustive checks that 'make test' leaves out"
	@echo "make lint       formatting, style and types only"
	@echo "make format     mend what the linter can"
	@echo "make clean      remove the virtual environment and what was printed"

# pip of this release or later knows dependency groups.
$(VENV)/made: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(PINNED) pip
	touch $@

# torch is pinned to a release with a CPU build, before anything asks for a newer one.
$(VENV)/test: $(VENV)/made pyproject.toml constraints.txt
	$(PIP) $(PINNED) torch
	$(PIP) $(PINNED) --editable '.[flax,interop,examples]' \
		--group test --group lint --group bench
	touch $@

$(VENV)/demo: $(VENV)/made pyproject.toml constraints.txt
	$(PIP) $(PINNED) --editable '.[examples]'
	touch $@

demo: $(VENV)/demo
	$(BIN)/python examples/mnist_iwrm.py

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) -m 'not slow'

test-slow: $(VENV)/test
	$(BIN)/python -m pytest -n $(WORKERS) -m slow

lint: $(VENV)/test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/mypy

format: $(VENV)/test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) out
