# make book   environment, weights, every notebook, the HTML; the last line is the path to open
# make test   environment, every test
# make bench  the side-by-side benchmarks
# make lint   ruff, mypy, import layers, clean notebooks
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: env book test bench lint
env: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("rim: Python 3.11 or newer is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[book,dev]"
	touch $@

book: env
	$(BIN)/rim book

test: env
	$(BIN)/python -m pytest

bench: env
	$(BIN)/python -m benchmarks

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/nb-clean check --remove-empty-cells --preserve-cell-metadata-field tags notebooks
