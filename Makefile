# The commands of CONTRIBUTING.md. The first run creates the virtual environment it needs.

PYTHON ?= python3.11
PYTHON_OLDEST ?= $(PYTHON)
PYTHON_NEWEST ?= python3.13
# The lower bounds of pyproject.toml, and whatever is the latest release.
OLDEST ?= jax==0.8.0 jaxlib==0.8.0 optax==0.2.7
NEWEST ?= jax jaxlib optax
VENV := .venv
BIN := $(VENV)/bin
PIP := -m pip --disable-pip-version-check install --quiet
PINNED := -c constraints.txt
# The tests use small arrays: more threads within a test would only slow it down.
WORKERS ?= 2
PYTEST := -m pytest -n $(WORKERS)
# A banner of the theme about other software of its authors.
export NO_MKDOCS_2_WARNING := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-oldest test-newest lint format docs docs-serve \
	docs-check docs-examples clean

help:
	@echo "make demo          train a CNN on MNIST by Jacobian descent (4 minutes)"
	@echo "make test          lint, then the whole test suite (7 minutes)"
	@echo "make test-slow     the exhaustive checks that 'make test' leaves out"
	@echo "make test-oldest   the tests with the oldest supported JAX"
	@echo "make test-newest   the tests with the newest JAX, on Python 3.13"
	@echo "make lint          formatting, style and types only"
	@echo "make format        fix what the linter can, and fill in the tables of methods"
	@echo "make docs          build the site into out/site; warnings are errors"
	@echo "make docs-serve    show the site, and build it anew whenever a file changes"
	@echo "make docs-check    look at every page in Chromium, which must be installed"
	@echo "make docs-examples run the examples, and keep their output for the site"
	@echo "make clean         remove the virtual environments and the folder 'out'"

# Update pip first: the dependency groups below need a recent one.
$(VENV)/made: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) $(PINNED) pip
	touch $@

# Install torch first, pinned to a CPU build, before a dependency asks for a newer one.
$(VENV)/test: $(VENV)/made pyproject.toml constraints.txt
	$(BIN)/python $(PIP) $(PINNED) torch
	$(BIN)/python $(PIP) $(PINNED) --editable '.[flax,interop,examples]' \
		--group test --group lint --group bench --group jinns
	touch $@

$(VENV)/demo: $(VENV)/made pyproject.toml constraints.txt
	$(BIN)/python $(PIP) $(PINNED) --editable '.[examples]'
	touch $@

$(VENV)/docs: $(VENV)/made pyproject.toml constraints.txt
	$(BIN)/python $(PIP) $(PINNED) --editable '.[flax]' --group docs --group test
	touch $@

# Without torch and Flax: the tests that need them are skipped.
$(VENV)-oldest/test: pyproject.toml
	$(PYTHON_OLDEST) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python $(PIP) --upgrade pip
	$(VENV)-oldest/bin/python $(PIP) --editable . --group test $(OLDEST)
	touch $@

$(VENV)-newest/test: pyproject.toml
	$(PYTHON_NEWEST) -m venv $(VENV)-newest
	$(VENV)-newest/bin/python $(PIP) --upgrade pip
	$(VENV)-newest/bin/python $(PIP) --upgrade --editable . --group test $(NEWEST)
	touch $@

demo: $(VENV)/demo
	$(BIN)/python examples/mnist_iwrm.py

test: lint
	$(BIN)/python $(PYTEST) -m 'not slow and not browser'

test-slow: $(VENV)/test
	$(BIN)/python $(PYTEST) -m slow

test-oldest: $(VENV)-oldest/test
	$(VENV)-oldest/bin/python $(PYTEST) -m 'not slow and not browser'

test-newest: $(VENV)-newest/test
	$(VENV)-newest/bin/python $(PYTEST) -m 'not slow and not browser'

lint: $(VENV)/test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/mypy

format: $(VENV)/test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python -m docs.tables

docs: $(VENV)/docs
	$(BIN)/mkdocs build --strict

docs-serve: $(VENV)/docs
	$(BIN)/mkdocs serve --strict --watch jaxjd --watch interop

docs-examples: $(VENV)/demo
	$(BIN)/python $(PIP) $(PINNED) --group jinns
	$(BIN)/python -m docs.run_examples

docs-check: docs
	$(BIN)/python -m pytest tests/test_site_in_browser.py -m browser

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest out
