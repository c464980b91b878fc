# Every target first sets up .venv if it is missing or older than the files that define it.
#   make demo          make and judge a recommender from a synthetic world
#   make test          the quick tests
#   make test-slow     the tests that `make test` leaves out
#   make test-all      all tests; those that need a GPU or real data are skipped without them
#   make test-oracles  our metrics against ranx, ir-measures and RecTools, which it installs
#   make test-spark    Spark gives the same results; installs PySpark, needs Java 17
#   make lint          formatting, lint, types; `make format` fixes what can be fixed
#   make bench         the measurements in benchmarks/
#   make study DATA=FOLDER   the study of CPRec's claims (hours, goes on where it stopped)
#   make study-small   every path of it on a generated world, in minutes
# PYTHON=...       the Python to build .venv from (3.11 to 3.13)
# TORCH_INDEX=...  another index to install PyTorch from: PyTorch's own for CPU builds (much smaller on Linux), or the
#                  one for your CUDA version. Run `make clean-venv` first.

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-all test-oracles test-spark lint format bench study study-small setup clean-venv

PYTHON ?=
TORCH_INDEX ?=
BIN := .venv/bin
READY := .venv/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet --quiet install --constraint constraints.txt

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

demo: $(READY)
	@$(BIN)/cprec demo

# Test models are tiny: one thread is faster than many, and leaves the machine to its user.
test: $(READY)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n 2 --dist loadfile \
	  -m "not slow and not gpu and not spark"

test-slow: $(READY)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n 2 --dist loadfile -m "slow and not gpu and not spark"

test-all: test-oracles
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n 2 --dist loadfile

# RecTools asks for older versions of numpy and pandas than ours; its metrics work with ours.
test-oracles: $(READY)
	@$(BIN)/python -c 'import ranx, ir_measures, rectools' 2>/dev/null || { echo "Installing ranx, ir-measures and RecTools." >&2; \
	  $(PIP) --editable '.[dev,oracles]'; $(PIP) --no-deps rectools==0.19.0; }
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest tests/unit/evaluate/test_metric_oracles.py

# Spark is large, and most people do without it.
test-spark: $(READY)
	@$(BIN)/python -c 'import pyspark' 2>/dev/null || { echo "Installing PySpark." >&2; $(PIP) --editable '.[dev,spark]'; }
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -m spark

lint: $(READY)
	@$(BIN)/ruff format --check --quiet --diff .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary

format: $(READY)
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

# Run by hand: sequential.py, which installs its peers in environments of their own and takes most of an hour, and
# parts.py, which needs data.
BENCH := $(filter-out $(addprefix benchmarks/,sequential.py generators.py parts.py new_items.py),$(wildcard benchmarks/*.py))
bench: $(READY)
	@for script in $(BENCH) "benchmarks/ranking.py codes" "benchmarks/generators.py --epochs 3"; do \
	  echo "== $$script"; $(BIN)/python $$script || exit 1; \
	done

# One thread a process, as the budget counts; ARGUMENTS may be --dry-run, --arms, --seeds, --budget-hours.
study: $(READY)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m benchmarks.study "$(DATA)" $(ARGUMENTS)

study-small: $(READY)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m benchmarks.study --small $(ARGUMENTS)

setup: $(READY)

clean-venv:
	rm -rf .venv

$(READY): pyproject.toml constraints.txt
	@set -e; \
	if [ ! -x $(BIN)/python ]; then \
	  chosen=; \
	  for python in $(if $(PYTHON),"$(PYTHON)",python3.11 python3.12 python3.13 python3 python); do \
	    if "$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; \
	    then chosen="$$python"; break; fi; \
	  done; \
	  if [ -z "$$chosen" ]; then \
	    echo "CPRec needs Python 3.11, 3.12 or 3.13, and $(if $(PYTHON),$(PYTHON) is none of them,none is on the PATH)." >&2; \
	    echo "Install one, or name it: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; \
	  fi; \
	  echo "Setting up .venv with $$($$chosen --version); this happens once and takes a few minutes." >&2; \
	  "$$chosen" -m venv .venv || { rm -rf .venv; \
	    echo "$$chosen cannot make virtual environments; on Debian and Ubuntu install python3-venv." >&2; exit 1; }; \
	else echo "Bringing .venv up to date." >&2; fi; \
	if ! $(BIN)/python -c 'import torch' >/dev/null 2>&1; then \
	  echo "  PyTorch ..." >&2; \
	  $(PIP) $(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)") torch; \
	fi; \
	echo "  the other packages ..." >&2; \
	$(PIP) --editable '.[dev]'; \
	touch $(READY)
