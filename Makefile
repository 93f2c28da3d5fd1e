# kvpack's commands. Each makes what it needs in .venv first; a second run finds it there.
#
#   make demo        an unmodified model on packed caches: bytes, speed, quality, text
#   make test        lint, C++ tests, sanitizers, NEON under qemu, Python tests, notebook
#   make test-full   the same with the exhaustive matrices, the operators on every ISA level, and test-oldest
#   make test-oldest the cache's tests with the oldest transformers that is supported
#   make bench       attention and encoding against torch, in one run
#   make lint        ruff, mypy, clang-format
#   make clean       removes what builds and tests leave (.venv stays; make distclean removes it too)
#
# PYTHON: the interpreter that .venv is made from. TORCH: what is installed as torch, before everything else.
# DEMO_ARGS, BENCH_ARGS, PYTEST_ARGS: further arguments of the command that runs last.
PYTHON ?= python3
TORCH ?= torch==2.13.0
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install -qq --constraint requirements/constraints.txt
# Directories too: their times tell that a file has gone.
SOURCES := CMakeLists.txt pyproject.toml $(shell find csrc cmake python/kvpack ! -name '*.so' ! -path '*__pycache__*')

export CMAKE_BUILD_PARALLEL_LEVEL := $(JOBS)

# Corpora and statistics for tests and benchmarks, if they lie beside the checkout.
KVPACK_DATA ?= $(abspath $(wildcard ../shared/data))
export KVPACK_DATA

.PHONY: help demo test test-full test-oldest bench bench-prototype lint install clean distclean
.DELETE_ON_ERROR:

help:
	@sed -n '3,9s/^# *//p' Makefile

demo: $(VENV)/.kvpack
	$(BIN)/kvpack demo $(DEMO_ARGS)

bench: $(VENV)/.kvpack
	$(BIN)/kvpack bench $(BENCH_ARGS)

# Beside the kernels in the folder PROTOTYPES (benchmarks/README.md).
bench-prototype: $(VENV)/.run
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --preset release -DKVPACK_TESTS=OFF
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build --preset release --target kvpack_core
	benchmarks/prototype.sh "$(PROTOTYPES)" build/release/libkvpack_core.a $(BENCH_ARGS)

test: $(VENV)/.kvpack $(VENV)/.test
	tools/test.sh $(PYTEST_ARGS)

test-full: $(VENV)/.kvpack $(VENV)/.test
	tools/test.sh --full $(PYTEST_ARGS)

test-oldest: $(VENV)/.kvpack $(VENV)/.test
	tools/oldest.sh $(PYTEST_ARGS)

lint: $(VENV)/.kvpack $(VENV)/.test
	tools/lint.sh

install: $(VENV)/.kvpack

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis kvpack-sweep
	find python tests -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f $(VENV)/.kvpack

distclean: clean
	rm -rf $(VENV)

# One stamp per layer, so that a change of the sources reinstalls kvpack and nothing else.
$(VENV)/.made:
	tools/system-packages.sh build
	$(PYTHON) tools/check_python.py
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch comes first: everything after it, and the build of kvpack, takes the torch that it finds.
$(VENV)/.torch: $(VENV)/.made
	@echo "installing $(TORCH)"
	@$(INSTALL) "$(TORCH)"
	@touch $@

$(VENV)/.run: $(VENV)/.torch requirements/run.txt requirements/build.txt requirements/constraints.txt
	@echo "installing requirements/build.txt and requirements/run.txt"
	@$(INSTALL) -r requirements/build.txt -r requirements/run.txt
	@touch $@

$(VENV)/.test: $(VENV)/.run requirements/test.txt
	@echo "installing requirements/test.txt"
	@$(INSTALL) -r requirements/test.txt
	tools/system-packages.sh test
	@touch $@

# An ordinary installation, not an editable one: the tests then run what a user gets. The build directory is kept,
# so that only what has changed is compiled again.
$(VENV)/.kvpack: $(VENV)/.run $(SOURCES)
	@echo "building and installing kvpack"
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) install -q --no-build-isolation --no-deps --force-reinstall .
	@touch $@
