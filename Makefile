# make demo     the whole pipeline on this machine        make test   the test suite
# make lint     format, lint, types, import contracts     make check  lint and test
# make bench-NAME   a benchmark of tests/benchmarks/: a table, a dated note in docs/benchmarks/, a line of JSON
# Each target sets up what it needs and is quick when that is done.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
CONFIG ?= configs/quickstart.yaml
LIMIT  := $(if $(shell command -v timeout),timeout 900)

.PHONY: demo test lint check peers clean
.DEFAULT_GOAL := check

demo: $(READY)
	$(BIN)/sae run $(CONFIG)

test: $(READY)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test

peers: .venv-peers/.ready

bench-%: $(READY)
	-$(MAKE) --no-print-directory peers
	$(BIN)/python -m tests.benchmarks.$*

clean:
	rm -rf $(VENV) .venv-peers build *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache

$(READY): pyproject.toml constraints.txt requirements-demo.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements-demo.txt
	@touch $@

.venv-peers/.ready: requirements-peers.txt requirements-peers-nodeps.txt constraints.txt
	test -d .venv-peers || $(PYTHON) -m venv .venv-peers
	$(LIMIT) .venv-peers/bin/python -m pip install --quiet --upgrade "pip>=24"
	$(LIMIT) .venv-peers/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)" --requirement requirements-peers.txt
	@grep -v '^#' requirements-peers-nodeps.txt | while read -r package; do \
		$(LIMIT) .venv-peers/bin/python -m pip install --quiet --no-deps "$$package" \
		|| echo "$$package could not be installed: what needs it will be reported as absent"; done
	@touch $@
