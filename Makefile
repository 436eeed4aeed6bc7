# Two commands do all the set-up:  make demo  (the main job on real input)  and  make test.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCUMENTS ?= 1000
PYTHON312 ?= python3.12
BENCH := .venv-bench
ANNBATCH := .venv-annbatch
BENCHMARKS ?=

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

$(BENCH)/.ready: pyproject.toml constraints.txt benchmarks/peers/requirements.txt
	test -x $(BENCH)/bin/python || $(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BENCH)/bin/python -m pip install --quiet --constraint constraints.txt --requirement benchmarks/peers/requirements.txt
	touch $@

$(ANNBATCH)/.ready:
	if command -v $(PYTHON312) && $(PYTHON312) -m venv $(ANNBATCH); then $(ANNBATCH)/bin/python -m pip install --quiet annbatch zarrs && touch $@; \
	else rm -rf $(ANNBATCH); echo 'annbatch is left out: it needs Python 3.12 (make PYTHON312=…)'; fi

bench: $(BENCH)/.ready $(ANNBATCH)/.ready  ## ratios against floors and peers, measured in this run, into docs/benchmarks.md
	$(BENCH)/bin/python -m pipelines.assets
	HF_HUB_OFFLINE=1 $(BENCH)/bin/python -m benchmarks $(BENCHMARKS)

docs: $(READY)  ## the documentation, into docs/_build
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/sphinx-build -W --keep-going -q docs docs/_build

clean:
	rm -rf $(VENV) $(BENCH) $(ANNBATCH) docs/_build demo
