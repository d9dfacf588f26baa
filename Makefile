# The commands of the project. Each does the set-up that it needs, so that any of them can come first.
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
NATIVE := setup.py pyproject.toml $(wildcard csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh csrc/include/torchext/*.h)

.PHONY: help setup train train-cpp test bench lint compile-cuda compile-triton gpu-check wheel clean
help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 16

$(VENV)/torch.stamp: Makefile
	@echo "setting up $(VENV): torch and its tools, then the kernels (minutes, once)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet "setuptools>=77" ninja
	@touch $@

$(VENV)/setup.stamp: $(VENV)/torch.stamp $(NATIVE)
	@# Warnings of torch's and setuptools' own, about NumPy (which .[dev] brings) and editable installs.
	PYTHONWARNINGS="ignore:Failed to initialize NumPy,ignore:Editable installation" \
	  $(BIN)/pip install --quiet --no-build-isolation -e ".[dev]"
	@touch $@

setup: $(VENV)/setup.stamp  ## make .venv, install torch, build and install torchext (editable)

train: setup  ## train 784-64-10 on the embedded digits; options in ARGS="..."
	$(BIN)/torchext train $(ARGS)

train-cpp: setup  ## build the LibTorch trainer (examples/cpp) and run it; options in ARGS="..."
	@PATH="$(abspath $(BIN)):$$PATH" cmake -G Ninja -S examples/cpp -B build/cpp --log-level=WARNING \
	  -DCMAKE_PREFIX_PATH="$$($(BIN)/python -c 'import torch, torchext; print(torchext.cmake_prefix_path(), torch.utils.cmake_prefix_path, sep=";")')"
	@PATH="$(abspath $(BIN)):$$PATH" cmake --build build/cpp
	build/cpp/train $(ARGS)

test: setup  ## run the tests; pytest's options in ARGS="..."
	$(BIN)/python -m pytest $(ARGS)

bench: setup  ## benchmarks on this machine, into benchmarks/results/; options in ARGS="..."
	$(BIN)/python -m benchmarks --quick $(ARGS)

lint: setup  ## ruff, clang-format, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/mypy

compile-cuda: setup  ## compile every CUDA kernel, without a GPU; registers, spills, instructions
	$(BIN)/python scripts/compile_cuda.py $(ARGS)

# The Triton of torch 2.11, the oldest torch that is served, knows less of the language.
build/triton-oldest/stamp: | $(VENV)/setup.stamp
	$(BIN)/pip install --quiet --upgrade --no-deps --target build/triton-oldest triton==3.6.0
	@touch $@

compile-triton: setup build/triton-oldest/stamp  ## compile every Triton kernel ahead of time, without a GPU
	$(BIN)/python scripts/compile_triton.py --also build/triton-oldest $(ARGS)

# The machine's own python3, torch, nvcc and Triton: such a machine may have no network.
gpu-check:  ## on a machine with a GPU: build, tests on CUDA (cases drawn), benchmarks, into OUT=dir
	$(PYTHON) scripts/gpu_check.py --out "$(or $(OUT),runs/gpu-check)" $(ARGS)

wheel: setup  ## build the abi3 wheel into dist/
	$(BIN)/pip wheel --quiet --no-build-isolation --no-deps -w dist .

clean:  ## remove what was built
	rm -rf build dist *.egg-info torchext/*.so
