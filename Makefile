# Both targets work on a fresh machine: they make .venv, install what they need, and run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := pyproject.toml constraints.txt

# Kernels that are compiled here serve a GPU elsewhere: with the Triton of that machine, to the byte. GPU_PYTHON names
# another interpreter that has it, in place of the environment that is made here (several GB, from the CUDA build).
PYTHON312 ?= python3.12
GPU_VENV := .venv-gpu
GPU_PYTHON ?= $(GPU_VENV)/bin/python
GPU_PACKAGES := torch==2.11.0 triton==3.6.0 transformers==5.17.0

.PHONY: demo test lint bench gpu-cache clean

demo: $(VENV)/.installed
	@$(BIN)/sliderquant demo

test: lint
	@$(BIN)/pytest -n auto --dist loadfile

lint: $(VENV)/.installed-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: $(VENV)/.installed-dev
	@$(BIN)/pytest benchmarks -q --benchmark-only

gpu-cache: $(if $(filter $(GPU_VENV)/%,$(GPU_PYTHON)),$(GPU_VENV)/.installed)
	@PYTHONPATH=.:kernels $(GPU_PYTHON) -m benchmarks gpu-cache build

clean:
	@rm -rf $(VENV) $(GPU_VENV) build dist demo-output

$(VENV)/bin/python:
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(SOURCES) | $(VENV)/bin/python
	@$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: $(SOURCES) | $(VENV)/bin/python
	@$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.installed

$(GPU_VENV)/.installed: pyproject.toml Makefile
	@$(PYTHON312) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null || \
	{ echo 'gpu-cache: $(PYTHON312) is no Python 3.12, which the compiled Triton needs; install it, for example with' \
	"'apt install python3.12 python3.12-venv' or 'uv python install 3.12', or name it: make gpu-cache PYTHON312=PATH"; \
	exit 1; }
	@$(PYTHON312) -m venv $(GPU_VENV)
	@$(GPU_VENV)/bin/pip install --quiet --disable-pip-version-check $(GPU_PACKAGES) -e '.[dev]'
	@touch $@
