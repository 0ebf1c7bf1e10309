# Set-up needs Python 3.11+, git and make; everything else goes into .venv.
PYTHON ?= python3
BIN := .venv/bin
# Many tests wait, for servers that are gone and runs that are stopped, and so run beside each other: files in their order, the longest first.
WORKERS ?= 2
PYTEST := $(BIN)/pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: help demo test test-fast test-cluster lint types imports format clean

help: ## list what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

# The stamp is newer than what the environment was made from: a second run re-uses it.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else "tpt_megatron needs Python 3.11 to 3.13; name one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[all,dev]'
	# By itself: what it asks for is for GPUs, and has torch warn at every start.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps \
		"nvidia-resiliency-ext; sys_platform == 'linux' and python_version < '3.13'"
	touch $@

demo: .venv/ready ## the whole road, small, on this machine: ends in demo-output/report-tokens/report.html
	$(BIN)/tpt demo --output demo-output

test: lint types imports .venv/ready ## linters, types, import rules, and every test that needs no GPU
	$(PYTEST)

test-fast: lint types imports .venv/ready ## the same without the slow tests
	$(PYTEST) -m 'not slow'

test-cluster: .venv/ready ## the tests on a real Slurm and on two hosts; tests/support/packages.sh installs what they start
	$(BIN)/pytest -m 'slurm or hosts'

lint: .venv/ready ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready ## mypy, strict
	$(BIN)/mypy

imports: .venv/ready ## import rules between rooms
	$(BIN)/lint-imports

format: .venv/ready ## reformat
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment, caches and the demo's output
	rm -rf .venv demo-output .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
