# make book   environment, weights, every notebook, the HTML; the last line is the path to open
# make test   environment, every test
# make bench  the side-by-side benchmarks
# make workflow  Snakemake, for clusters and for grids of suites: see companion/workflow/README.md
# make lint   ruff, mypy, import layers, clean notebooks
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: env book test bench workflow lint
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

test: env workflow
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# The peers get an environment of their own, which sees the project's packages and cannot change them.
$(VENV)/bench/.ready: benchmarks/requirements.txt constraints.txt $(VENV)/.ready
	$(BIN)/python -m venv $(VENV)/bench
	$(BIN)/python -c 'import sysconfig as s; print("import site; site.addsitedir(%r)" % s.get_path("purelib"))' \
	  > "$$($(VENV)/bench/bin/python -c 'import sysconfig as s; print(s.get_path("purelib"))')/project.pth"
	$(VENV)/bench/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r benchmarks/requirements.txt
	touch $@

bench: $(VENV)/bench/.ready
	$(VENV)/bench/bin/python -m pytest -q tests/test_parity.py
	$(VENV)/bench/bin/python -m benchmarks

# Snakemake needs an older `packaging` than the project, so it shares nothing with it but the command `rim`.
workflow: $(VENV)/workflow/.ready

$(VENV)/workflow/.ready: companion/workflow/requirements.txt $(VENV)/.ready
	$(BIN)/python -m venv $(VENV)/workflow
	$(VENV)/workflow/bin/python -m pip install --quiet --disable-pip-version-check -r companion/workflow/requirements.txt
	touch $@

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/nb-clean check --remove-empty-cells --preserve-cell-metadata-field tags notebooks
