# Thin on purpose: people and CI run the same commands. Each target installs what it needs into $(VENV) first.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
JOBS ?= 2
OLDEST := transformers==5.20.0
# What goes through transformers. Left out: our own reader and writer of checkpoints, packing, scoring, and the notebooks,
# whose calls are those of other tests.
HABITS := tests/habits tests/loading tests/model/test_static_cache.py \
	$(patsubst %,--ignore=tests/habits/test_%.py,cli_eval evaluation info_memory notebooks safetensors_tools) \
	$(patsubst %,--ignore=tests/loading/test_%.py,damaged_directories loading_memory name_spellings \
		packed_checkpoints strictness)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STATUS := $(BIN)/python -c "from nemotron_h.ops import _native as n; print(n.why_missing() or 'C++ kernels: ' + n.level())"
PYTEST = $(BIN)/python -m pytest -n $(JOBS) --dist worksteal
SOURCES := pyproject.toml CMakeLists.txt $(wildcard csrc/*.h csrc/*.cpp csrc/kernels/*.cpp)
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev

.PHONY: help demo test oldest campaign check check-types check-style check-kernels sanitize aarch64 amx format clean

help:
	@echo "make demo      write some text with the model that ships with the package"
	@echo "make test      the test suite"
	@echo "make oldest    the tests of what goes through transformers, against the oldest transformers that we promise"
	@echo "make campaign  the tests that take minutes"
	@echo "make check     linters, types, import rules, file lengths, README's tree"
	@echo "make check-kernels  the suites that run the model, the reference beside every kernel"
	@echo "make sanitize  the kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make aarch64   the kernels' generic level built for aarch64 and run under qemu (Debian's packages)"
	@echo "make amx       the kernels' level with matrix units under Linux in the emulator Bochs (Debian's packages)"
	@echo "make format    let ruff format and mend what it can"
	@echo "make clean     remove $(VENV) and all caches"

demo: $(INSTALLED)
	$(BIN)/nemotron-h generate "Elizabeth" --seed 1 --ignore-eos

test: $(INSTALLED_DEV)
	$(PYTEST)

oldest: $(INSTALLED_DEV)
	$(PIP) install -q --no-deps --upgrade --target $(VENV)/oldest $(OLDEST)
	PYTHONPATH=$(abspath $(VENV)/oldest) $(PYTEST) $(HABITS)

campaign: $(INSTALLED_DEV)
	$(BIN)/python -m pytest -m campaign

check: check-types check-style

check-types: $(INSTALLED_DEV)
	$(BIN)/pyright --pythonpath $(BIN)/python

check-style: $(INSTALLED_DEV)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports
	$(BIN)/python tools/budget.py
	$(BIN)/python tools/readme_tree.py

check-kernels: $(INSTALLED_DEV)
	NEMOTRON_H_CHECK=1 $(PYTEST) tests/kernels tests/model tests/generation tests/hackable

sanitize: $(INSTALLED_DEV)
	$(PIP) install -q "scikit-build-core>=0.11" "nanobind>=2.4" cmake ninja
	$(BIN)/python tools/sanitize.py -n $(JOBS)

aarch64:
	tools/aarch64.sh

amx:
	tools/amx.sh

format: $(INSTALLED_DEV)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first and alone: its CPU build must be the one that pip settles on.
$(INSTALLED): $(SOURCES) | $(BIN)/python
	$(PIP) install -q $(TORCH)
	$(PIP) install -q -e .
	@$(STATUS)
	@touch $@

$(INSTALLED_DEV): $(SOURCES) | $(BIN)/python
	$(PIP) install -q $(TORCH)
	$(PIP) install -q -e '.[dev]'
	@$(STATUS)
	@touch $(INSTALLED) $@
