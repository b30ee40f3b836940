# make setup | test | demo | bench | bench-peers | bench-check | reproduce
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 2

.PHONY: setup test lint demo bench bench-peers bench-check reproduce clean

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
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python -m fedsieve.bench.codec
	$(BIN)/python -m fedsieve.bench.kernels
	$(BIN)/python -m fedsieve.bench.inference
	$(BIN)/python -m fedsieve.bench.rounds
	$(BIN)/python -m fedsieve.bench.compress
	$(BIN)/python -m fedsieve.bench.memory
	$(BIN)/python -m fedsieve.bench.scale

# Options: make bench-peers ARGS='--jobs J2 --repetitions 1'
bench-peers: setup
	$(BIN)/python -m fedsieve.bench.peers $(ARGS)

bench-check: setup
	$(BIN)/python -m fedsieve.bench.history

reproduce: setup
	$(BIN)/python -m fedsieve.bench.reproduce
	$(BIN)/python -m fedsieve.bench.federated
	$(BIN)/python -m fedsieve.bench.hidenseek
	$(BIN)/python -m fedsieve.bench.privacy

clean:
	rm -rf .venv .peers runs
