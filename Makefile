# make demo    one recipe on its real data, from nothing to the verdict
# make test    every test and every notebook
# make lint    lint, formatting and types
# make notebooks [NOTEBOOKS=notebooks/01_*.ipynb]
#              executes them again, top to bottom, and keeps what they show
#
# Each sets up .venv first, and again only when pyproject.toml or constraints.txt has changed.
# Another interpreter: make demo PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALL := $(RUN) -m pip install --quiet --no-input --disable-pip-version-check --constraint constraints.txt

# The models are small: one thread each is faster than several that wait for one another.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo test lint notebooks clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

demo: $(VENV)/runtime.stamp
	$(RUN) -m recipes run logistic_regression

test: $(VENV)/test.stamp
	$(RUN) -m pytest -n 2
	$(RUN) -m pytest -n 2 --dist loadfile --nbval-lax notebooks

lint: $(VENV)/test.stamp
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

NOTEBOOKS ?= notebooks/*.ipynb
EXECUTE := import sys, nbformat, nbclient; \
    [nbformat.write(nbclient.NotebookClient(nbformat.read(path, 4), record_timing=False).execute(), path) \
    for path in sys.argv[1:]]
notebooks: $(VENV)/test.stamp
	$(RUN) -c '$(EXECUTE)' $(NOTEBOOKS)

clean:
	rm -rf $(VENV)

# torch comes first and by itself: asked for through another package's open range, pip would take
# the newest build and gigabytes of CUDA libraries with it.
$(VENV)/runtime.stamp: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo >&2 \
	    "No '$(PYTHON)' here. Install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo >&2 \
	    "vi-recipes needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12"; exit 1; }
	@echo "Setting up $(VENV): a few minutes, this once."
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(INSTALL) torch==2.13.0
	$(INSTALL) --editable .
	@touch $@

$(VENV)/test.stamp: $(VENV)/runtime.stamp
	$(INSTALL) --editable '.[test]'
	@touch $@
