# make demo    fit one recipe to its real data, compare it with MCMC and print the verdict
# make test    run every test and every notebook
# make lint    check style, formatting and types
# make notebooks [NOTEBOOKS=notebooks/01_*.ipynb]
#              execute notebooks from top to bottom and keep their output
# make torch-versions, make arviz-versions
#              test several versions of PyTorch (downloads several GB for each) or of ArviZ
#
# Each command first sets up .venv, and again only after pyproject.toml or constraints.txt has changed.
# To use another interpreter: make demo PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALL := $(RUN) -m pip install --quiet --no-input --disable-pip-version-check --constraint constraints.txt

# The models are small: one thread each is faster than several that wait for one another.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo test lint notebooks torch-versions arviz-versions clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

demo: $(VENV)/recipes.stamp
	$(RUN) -m recipes run logistic_regression

test: $(VENV)/test.stamp
	$(RUN) -m pytest -n 2
	$(RUN) -m pytest -n 2 --dist loadfile --nbval-lax notebooks

lint: $(VENV)/test.stamp
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

NOTEBOOKS ?= notebooks/*.ipynb
EXECUTE := import os, sys, nbformat, nbclient; \
    [nbformat.write(nbclient.NotebookClient(nbformat.read(path, 4), record_timing=False, \
    resources={"metadata": {"path": os.path.dirname(path)}}).execute(), path) \
    for path in sys.argv[1:]]
notebooks: $(VENV)/test.stamp
	$(RUN) -c '$(EXECUTE)' $(NOTEBOOKS)

torch-versions arviz-versions: $(VENV)/test.stamp
	$(RUN) -m benchmarks.versions $(@:-versions=)

clean:
	rm -rf $(VENV)

# torch is installed first and by itself. As a dependency of another package pip would install the
# newest version, which brings gigabytes of CUDA libraries.
$(VENV)/recipes.stamp: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo >&2 \
	    "No '$(PYTHON)' here. Install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo >&2 \
	    "vi-recipes needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12"; exit 1; }
	@echo "Setting up $(VENV). This takes a few minutes, once."
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(INSTALL) torch==2.13.0
	$(INSTALL) --editable '.[recipes]'
	@touch $@

$(VENV)/test.stamp: $(VENV)/recipes.stamp
	$(INSTALL) --editable '.[test]'
	@touch $@
