# Two commands do all the set-up:  make demo  (the main job on real input)  and  make test.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCUMENTS ?= 1000

.PHONY: demo test lint bench docs clean
.DEFAULT_GOAL := test

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(READY)  ## fetch a model and texts, capture every layer, probe every layer, write a report
	$(BIN)/flexcache demo --documents $(DOCUMENTS)

test: $(READY)  ## the test suite
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2

lint: $(READY)  ## format, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY)  ## ratios against floors and peers, measured in this run
	$(BIN)/python -m benchmarks.capture
	$(BIN)/python -m benchmarks.read
	$(BIN)/python -m benchmarks.hooks
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.statistics
	$(BIN)/python -m benchmarks.probes
	$(BIN)/python -m benchmarks.replay
	$(BIN)/python -m benchmarks.moving
	$(BIN)/python -m benchmarks.stream
	$(BIN)/python -m benchmarks.growth --plan 1e8 --stand-in 1e10 --rows 0
	$(BIN)/python -m benchmarks.reliability

docs: $(READY)  ## the documentation, into docs/_build
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/sphinx-build -W --keep-going -q docs docs/_build

clean:
	rm -rf $(VENV) docs/_build demo
