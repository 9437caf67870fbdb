# On a machine with Python 3.11 or newer and the package registries, each of these does its own
# set-up in .venv:
#   make figures   regenerates the paper's figures into build/figures and prints the claims
#   make test      runs the tests
# For development: make lint, make format, make lock; make test-slow, the tests that take longer than
# seconds each; and make mutants, which plants mistakes and sees that the tests notice them (half an
# hour). PYTHON=python3.13 chooses an interpreter, in an environment that replaces the one before.

PYTHON ?= python3
BIN := .venv/bin
UV ?= uv
# One environment at a time: another interpreter makes it anew.
INSTALLED := .venv/installed-$(subst /,-,$(PYTHON))

.PHONY: figures test test-slow mutants lint format lock

figures: $(INSTALLED)
	$(BIN)/python -m experiments

test: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

mutants: $(INSTALLED)
	$(BIN)/python -m tests.mutants

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The stamp is older than what it depends on, or missing, when something must be installed.
$(INSTALLED): requirements.lock pyproject.toml
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
