# Everything on a fresh machine that has make, python3 (3.11 or later) with venv, and the package index.
#
#   make demo    the main job on real data: the land of the Earth at one kilometre
#   make test    lint, formatting, types, tests and doctests; then what is optional
#   make soak    faults and random programs under SIGKILL, for MINUTES (60)
#   make bench   every benchmark, one after the other
#
# The virtual environment is made on first use and kept; PYTHON and VENV may be set to other ones.
# make test runs two files of tests at a time; PROCESSES=0: one after the other, in one process.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
BENCHMARKS := $(filter-out benchmarks/measure.py,$(sort $(wildcard benchmarks/*.py)))

MINUTES ?= 60
# How many files of tests run at a time; 0: one after the other, in one process.
PROCESSES ?= 2
TESTS = $(BIN)/python -m pytest --numprocesses=$(PROCESSES) --dist=loadfile --no-loadscope-reorder
# Every file that has more to do in a soak.
SOAKED := $(shell grep -rl --include="test_*.py" SOAK_MINUTES tests)

.PHONY: demo test soak bench clean

demo: $(VENV)/.demo-installed
	$(BIN)/python examples/land_mask.py

# The examples are tested on their real data, hence the demo extra.
test: $(VENV)/.test-installed $(VENV)/.demo-installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pip uninstall --quiet --yes llvmlite  # first without what is optional
	$(TESTS)
	$(BIN)/python -m pytest --doctest-modules shmarray --ignore=shmarray/kernels/llvm
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[jit]"
	$(TESTS) tests/shmarray/test_llvm_*.py tests/shmarray/test_blocked_steps.py tests/shmarray/test_masks_in_steps.py tests/faults/test_blocked_kill.py tests/shmarray/test_explain.py tests/test_docs.py
	$(TESTS) tests/shmarray/test_exactly_once.py -k llvm

# Prints the first seed; SHMARRAY_SOAK_SEED=... repeats from there.
soak: $(VENV)/.test-installed
	SHMARRAY_SOAK_MINUTES=$(MINUTES) $(BIN)/python -m pytest -s $(SOAKED)

bench: $(VENV)/.bench-installed
	@set -e; for file in $(BENCHMARKS); do echo "== $$file"; $(BIN)/python $$file; echo; done

clean:
	rm -rf $(VENV)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "shmarray needs Python 3.11 or later; say which with make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# One stamp per extra: what is installed already is not looked at again until pyproject.toml changes.
$(VENV)/.%-installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$*]"
	@touch $@
