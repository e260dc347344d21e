# One command a task: `make` lists them. What has been installed is remembered in .venv, so a second run starts at once.

PYTHON ?= python3
ARGS ?=
MINUTES ?= 2
TOPOLOGY ?= embedded
SEED ?=
PYTHONS ?= python3.11 python3.12 python3.13

BIN := .venv/bin
INSTALLED := .venv/.installed
NPM := $(shell command -v npm 2>/dev/null)
BROWSER_MODULES := $(if $(NPM),tests/browser/node_modules/.installed)

# Scripts lint sees only when they are named: they have no .py in their names.
SCRIPTS := .ci/can-install .ci/wheel-check

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install up test coverage test-long test-pythons breaks faults fuzz check format docs wheel-check lock clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: $(INSTALLED) ## make the virtual environment .venv and install everything into it

up: $(INSTALLED) ## run everything on this machine: make up ARGS="--gateways 2"
	@exec $(BIN)/tidewire up $(ARGS)

test: check $(BROWSER_MODULES) ## all checks, then all tests, four at a time: make test ARGS="tests/unit -x"
	@$(BIN)/python -m pytest --numprocesses 4 --dist loadfile $(ARGS)

coverage: $(INSTALLED) ## unit and contract tests, with the lines that none of them runs
	@$(BIN)/python -m pytest --numprocesses 4 --dist loadfile --cov --cov-report term:skip-covered tests/unit tests/contract

test-long: $(INSTALLED) $(BROWSER_MODULES) ## all tests in full: 100,000 writes, all of it on a cluster, more kills
	@TIDEWIRE_TEST_LONG=1 $(BIN)/python -m pytest $(ARGS)

test-pythons: ## the unit tests under each version of Python that is on this machine
	@for python in $(PYTHONS); do \
		$$python -c '' 2>/dev/null || { echo "$$python is not on this machine: skipped"; continue; }; \
		venv=.venvs/$$(basename $$python); \
		$$python -m venv $$venv && $$venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes \
			--requirement requirements-dev.txt && $$venv/bin/python -m pip install --quiet --disable-pip-version-check \
			--no-deps --editable . && $$venv/bin/python --version && \
			$$venv/bin/python -m pytest --quiet --numprocesses 2 --dist loadfile $(or $(ARGS),tests/unit) || exit 1; \
	done

breaks: $(INSTALLED) ## take out one guard after another, and see that the checker of runs under faults notices
	@TIDEWIRE_TEST_BREAKS=1 $(BIN)/python -m pytest -s tests/faults/test_faults.py -k missing_guard $(ARGS)

fuzz: $(INSTALLED) ## send 100,000 random handshakes and frames to a gateway, and see that nothing breaks or stays behind
	@TIDEWIRE_TEST_FUZZ=100000 $(BIN)/python -m pytest -s tests/contract/test_fuzz.py $(ARGS)

check: $(INSTALLED) ## lint, format, types, spelling, import contracts
	$(BIN)/ruff check . $(SCRIPTS)
	$(BIN)/ruff format --check . $(SCRIPTS)
	$(BIN)/mypy
	$(BIN)/mypy --explicit-package-bases tests deploy
	$(BIN)/mypy .ci/wheel-check
	$(BIN)/codespell
	$(BIN)/lint-imports

format: $(INSTALLED) ## format the code, and apply the fixes that lint knows
	$(BIN)/ruff check --fix-only . $(SCRIPTS)
	$(BIN)/ruff format . $(SCRIPTS)

faults: $(INSTALLED) ## everything under faults, checked: make faults MINUTES=10 TOPOLOGY=cluster SEED=7 ARGS="--parts crowd"
	@$(BIN)/python -m tests.faults.run --minutes $(MINUTES) --topology $(TOPOLOGY) $(if $(SEED),--seed $(SEED)) $(ARGS)

docs: $(INSTALLED) ## build the documentation site into site/, with warnings as errors
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

lock: $(INSTALLED) ## update requirements-dev.txt after a change of dependencies in pyproject.toml
	@$(BIN)/python -m pip install --quiet uv
	@$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --extra dev --generate-hashes --no-annotate --no-header \
		pyproject.toml --output-file requirements-dev.txt

wheel-check: $(INSTALLED) ## build the wheel and use it as a stranger would, in an empty environment
	@$(BIN)/python .ci/wheel-check

clean: ## remove what these commands made, except the data of `make up` in .tidewire
	rm -rf .venv .venvs tests/browser/node_modules build dist htmlcov site .coverage .coverage.*
	rm -rf .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Installed anew when pyproject.toml changes; from nothing when the clone was moved or copied (an environment holds the
# path of its folder) or the Python it was made with has gone.
ifneq ($(shell test -x $(BIN)/python && cat $(INSTALLED) 2>/dev/null),$(CURDIR))
.PHONY: $(INSTALLED)
CLEAR := --clear
endif

$(INSTALLED): pyproject.toml requirements-dev.txt
	@command -v $(PYTHON) >/dev/null || { \
		echo "There is no $(PYTHON) here. Tidewire needs Python 3.11 or newer: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) .ci/can-install $(PYTHON)
	@echo "Installing Tidewire and its tools into .venv: once, it takes a minute."
	@$(PYTHON) -m venv $(CLEAR) .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements-dev.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@echo '$(CURDIR)' > $@

tests/browser/node_modules/.installed: tests/browser/package-lock.json
	$(NPM) ci --prefix tests/browser
	@touch $@
