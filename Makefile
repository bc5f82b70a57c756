# Two commands: `make demo` and `make test`. Each makes .venv when it is missing, installs, builds and runs.
# In an environment of your own, without network if the packages are there: `make test VENV=none`.

VENV ?= .venv
PYTHON ?= python3
# torch comes first and pinned: whatever depends on a bare torch would bring another build of it.
TORCH ?= torch==2.13.0
# numpy, because torch warns where it is missing.
BUILD_TOOLS = 'setuptools>=77' 'ninja>=1.11' numpy
# Test files that run at a time; a file stays together, for what its tests share.
WORKERS ?= 2
PYTEST_FLAGS ?=

ifeq ($(VENV),none)
RUN := $(PYTHON)
CLANG_FORMAT := clang-format
LINT_IMPORTS := lint-imports
else
RUN := $(VENV)/bin/python
CLANG_FORMAT := $(VENV)/bin/clang-format
LINT_IMPORTS := $(VENV)/bin/lint-imports
ifneq ($(shell command -v nvcc 2>/dev/null),)
HEADERS := $(VENV)/headers/installed
endif
endif

.PHONY: help demo test lint docs venv build wheel wheel-check clean

help:
	@echo "make demo    train a small language model, then improve it with DPO; no download, under 5 minutes"
	@echo "make test    build, and run the whole test suite"
	@echo "make lint    formatting, lint, types and the direction of imports, as a change must have them"
	@echo "make docs    the documentation, into site/; a broken link is an error"
	@echo "make venv    make .venv with all that is needed, and build"
	@echo "make wheel   the wheel, into dist/: every Python, a CPU library for each torch that is supported, the CUDA library"
	@echo "make wheel-check  install that wheel in environments without a compiler, and run the demo and the loss's tests"
	@echo "make clean   remove what was built"
	@echo "VENV=none    use the active environment instead of .venv; PYTHON=... names its interpreter"

demo: venv
	$(RUN) -m fastdpo demo

test: venv $(HEADERS)
	$(RUN) -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_FLAGS)

lint: venv
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	PYTHONPATH=bench $(LINT_IMPORTS) --no-logo
	$(CLANG_FORMAT) --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.h' 'tests/*.cpp')

# Not --quiet, with which --strict sees no warning. NO_MKDOCS_2_WARNING: without the theme's advertisement.
docs: venv
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

ifeq ($(VENV),none)
venv: build
else
venv: $(VENV)/installed build

# Compiled before it is installed, because pip keeps what is said meanwhile to itself.
$(VENV)/installed: pyproject.toml
	@echo "fastdpo: making $(VENV): first torch and the tools are installed, then the kernels are compiled (some minutes on"
	@echo "fastdpo: two cores, once; with a line for each file), then the other packages are installed"
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q '$(TORCH)'
	$(VENV)/bin/python -m pip install -q $(BUILD_TOOLS)
	$(VENV)/bin/python setup.py -q build_ext --inplace
	$(VENV)/bin/python -m pip install -q --no-build-isolation -e '.[test,lint,wheel]'
	@touch $@

build: $(VENV)/installed

# For the tests of Level 1's PTX. Beside the packages: among them, CUTLASS would have Level 1 built for a device, which
# takes minutes, with all that its Python asks for. Without network the rest is tested, and the next time it is tried again.
$(VENV)/headers/installed: $(VENV)/installed
	@$(VENV)/bin/python -m pip install -q --upgrade --no-deps --target $(VENV)/headers nvidia-cutlass==4.2.0.0 && touch $@ \
	  || echo "CUTLASS's headers could not be downloaded: Level 1's PTX is not run (tests/ptx/test_level1.py and others skip)"
endif

# Quick when nothing changed: ninja compiles what is newer than its object alone.
build:
	@$(RUN) setup.py -q build_ext --inplace
	@$(RUN) -m pip install -q --no-build-isolation --no-deps -e .

# Level 1 is in it, for which CUTLASS's headers are needed: beside the packages, as above. TORCHES="2.13.0" makes a
# wheel with a CPU library for that one alone.
WHEEL_FLAGS = $(if $(TORCHES),--torches "$(TORCHES)")
wheel: venv $(HEADERS)
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" PYTHONPATH="$(CURDIR)/$(VENV)/headers" $(RUN) -m building.wheel $(WHEEL_FLAGS)

# CHECKS is a list of python:torch, such as "python3.12:2.14.1 python3.11:2.13.0+cpu"; takes gigabytes and minutes.
CHECKS ?= $(PYTHON):2.13.0
wheel-check:
	$(RUN) -m building.check $(CHECKS)

clean:
	rm -rf build dist site fastdpo/*.so fastdpo/_build.json *.egg-info
