# The habits of this project. Every target sets up what it needs; a machine with Python >= 3.10 is enough.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-versions lint format bench bench-attacks docs clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' Makefile

demo: .venv/.stamp  ## train and attack a small net on real digits; figures go to out/
	$(BIN)/rai-toolbox demo

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --timeout=300 --numprocesses=auto

test: .venv/.stamp  ## run the tests but the slow ones, and the examples of the docs (5 minutes)
	$(PYTEST) -m "not slow"

test-all: .venv/.stamp  ## run all tests (25 minutes on 2 cores)
	$(PYTEST)

test-versions:  ## run some tests on the oldest and the newest torch (11 GB of disk)
	$(PYTHON) tests/versions.py $(TORCH)

lint: .venv/.stamp  ## check style, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: .venv/.stamp  ## put the code into the shape that `make lint` asks for
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: .venv/.bench  ## measure the claims of speed; renews docs/speed/
	$(BIN)/python benchmarks/run.py

# glibc keeps the memory of a step for the next one: to map it anew takes a third of the time
STEADY := MALLOC_TRIM_THRESHOLD_=2000000000 MALLOC_MMAP_THRESHOLD_=1000000000

bench-attacks: .venv/.attacks  ## measure attacks beside other libraries'; renews docs/attacks/
	$(STEADY) $(BIN)/python benchmarks/attacks.py
	$(BIN)/python benchmarks/standard_attacks.py
	$(BIN)/python benchmarks/default_ensemble.py
	$(BIN)/python benchmarks/adversarial_training.py

docs: .venv/.stamp  ## build the documentation into out/docs
	$(BIN)/python -m sphinx -W --keep-going -E -q docs out/docs
	@echo "open out/docs/index.html"

clean:  ## remove all that was made, but for the environment (.venv)
	rm -rf out build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment is renewed whenever what it is made of changes. (pip < 25.1 has no --group.)
.venv/.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(PIP) "pip>=25.1"
	$(PIP) -e ".[demo]" --group dev
	@touch $@

.venv/.bench: .venv/.stamp  # only here: libraries to compare with
	$(PIP) --group bench
	@touch $@

# torchattacks asks for torchvision, which it never imports, and for an old version of requests
.venv/.attacks: .venv/.stamp  # only here: libraries to compare with
	$(PIP) --group attacks
	$(PIP) --no-deps torchattacks
	@touch $@
