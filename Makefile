# Two commands do all the set-up:  make demo  (the main job on real input)  and  make test.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO_READY := $(VENV)/.ready-demo
DOCUMENTS ?= 1000
# Python 3.13 on the PATH, or among the versions of pyenv; nothing where there is none.
PYTHON313 ?= $(firstword $(shell PYENV_VERSION=3.13 python3.13 -c 'import ensurepip, sys; print(sys.executable)' 2>/dev/null) \
	$(wildcard $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions/3.13*/bin/python3.13))
BENCH := .venv-bench
READING_PEERS := .venv-reading-peers
READING := .venv-reading
# What needs no torch: stores filled by numpy, read, analysed, and sent to Dask workers.
READING_TESTS := tests/golden tests/analysis/test_dask.py \
	$(foreach name,pickling zarr shard,tests/store/test_$(name).py) \
	$(foreach name,moments quantiles geometry outliers similarity probe_dataset probe_targets,tests/analysis/test_$(name).py)
BENCHMARKS ?=

.PHONY: demo test test-slow test-reading lint bench docs clean
.DEFAULT_GOAL := test

# The demo needs a part of what the tests need; both have the same versions.
$(READY): EXTRA = dev
$(DEMO_READY): EXTRA = capture
$(READY) $(DEMO_READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRA)]'
	touch $@

demo: $(DEMO_READY)  ## fetch a model and texts, capture every layer, probe every layer, write a report
	$(BIN)/flexcache demo --documents $(DOCUMENTS)

test: $(READY)  ## the test suite
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2

test-slow: $(READY)  ## the tests marked slow, with DeepSpeed, whose communication kernel they compile
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[deepspeed]'
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 -m slow

$(READING)/.ready: pyproject.toml
	rm -rf $(READING)
	$(PYTHON313) -m venv $(READING)
	$(READING)/bin/python -m pip install --quiet --editable '.[cluster]' 'pytest>=8' 'pytest-xdist>=3.6' 'hypothesis>=6.100'
	touch $@

ifneq ($(PYTHON313),)
test-reading: $(READING)/.ready  ## reading, analysis and Dask on Python 3.13 with the newest zarr, without torch
	$(READING)/bin/python -c 'import zarr, sys; print("Python", sys.version.split()[0], "zarr", zarr.__version__)'
	$(READING)/bin/python -W error -c 'import flexcache, analysis.statistics.moments, analysis.probes, pipelines.cli'
	$(READING)/bin/python -m pytest -n 2 $(READING_TESTS)
else
test-reading:
	@echo 'test-reading is left out: there is no Python 3.13 (make PYTHON313=…)'
endif

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

$(READING_PEERS)/.ready: benchmarks/peers/requirements-reading.txt
	rm -rf $(READING_PEERS)
	@if $(if $(PYTHON313),$(PYTHON313) -m venv $(READING_PEERS),false); then \
	$(READING_PEERS)/bin/python -m pip install --quiet --requirement benchmarks/peers/requirements-reading.txt && touch $@; \
	else echo 'zarr-python, tensorstore and annbatch are left out: there is no Python 3.13 (make PYTHON313=…)'; fi

bench: $(BENCH)/.ready $(READING_PEERS)/.ready  ## ratios against floors and peers, measured in this run, into docs/benchmarks.md
	$(BENCH)/bin/python -m pipelines.demo.assets
	HF_HUB_OFFLINE=1 $(BENCH)/bin/python -m benchmarks $(BENCHMARKS)

docs: $(READY)  ## the documentation, into docs/_build
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/sphinx-build -W --keep-going -q docs docs/_build

clean:
	rm -rf $(VENV) $(BENCH) $(READING_PEERS) $(READING) docs/_build demo
