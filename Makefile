# On a machine with Python 3.11 or newer and the package registries, each of these does its own
# set-up in .venv:
#   make figures   regenerates the paper's figures and prints the claims
#   make test      runs the tests
# For development: make lint, make format, make lock, and make mutants, which plants mistakes and
# sees that the tests notice (an hour). PYTHON=python3.12 chooses an interpreter.

PYTHON ?= python3
BIN := .venv/bin
UV ?= uv

.PHONY: figures test mutants lint format lock

figures: .venv/installed
	$(BIN)/python -m experiments

test: .venv/installed
	$(BIN)/python -m pytest

mutants: .venv/installed
	$(BIN)/python -m tests.mutants

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The stamp is older than what it depends on, or missing, when something must be installed.
.venv/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("pcdyn needs Python 3.11 or newer, but $(PYTHON) is " + sys.version.split()[0] + "; give another one: make PYTHON=python3.12")'
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps -e .
	touch $@

# Names and versions only: no index, no address, and nothing of the machine that wrote it.
lock:
	$(UV) pip compile --quiet --universal --python-version 3.11 --group dev --no-header \
		--no-annotate --no-emit-index-url --no-emit-find-links pyproject.toml \
		--output-file requirements.lock
