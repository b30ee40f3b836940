# make setup | test | demo | bench | bench-check | reproduce
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 2

.PHONY: setup test lint demo bench bench-check reproduce clean

setup: .venv/.stamp

# torch goes in first and pinned, so that no other requirement pulls in another build of it.
.venv/.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

lint: setup
	$(BIN)/ruff format --check src tests examples
	$(BIN)/ruff check src tests examples
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/pytest -n 2 --dist loadgroup

demo: setup
	$(BIN)/fedsieve demo

bench: setup
	$(BIN)/python -m fedsieve.bench.codec
	$(BIN)/python -m fedsieve.bench.rounds
	$(BIN)/python -m fedsieve.bench.memory
	$(BIN)/python -m fedsieve.bench.scale

bench-check: setup
	$(BIN)/python -m fedsieve.bench.history

reproduce: setup
	$(BIN)/python -m fedsieve.bench.reproduce

clean:
	rm -rf .venv runs
