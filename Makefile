# Every target sets up what it needs. PYTHON chooses the interpreter of a new .venv; PYTHON_ENV=system uses the
# current interpreter as it is, without a virtual environment and without installing dependencies.
PYTHON ?= python3
PYTHON_ENV ?= venv
ifeq ($(PYTHON_ENV),system)
  PY := $(PYTHON)
  STAMPS := build/stamps/system
  INSTALL := true
else
  PY := .venv/bin/python
  STAMPS := .venv/stamps
  INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check
endif
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
MAX_JOBS ?= 2
export MAX_JOBS

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench doctor gpu-check build
.SECONDARY:

help: ## shows this
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(STAMPS)/build $(STAMPS)/demo ## trains a small language model with torch's loss and with ours, and shows both
	$(PY) examples/train_language_model.py --output outputs/demo

test: $(STAMPS)/build $(STAMPS)/test $(STAMPS)/demo $(STAMPS)/integrations ## runs the whole suite
	$(PY) -m pytest -n 2
	TRITON_INTERPRET=1 $(PY) -m pytest tests/triton/interpreted -n 2
	$(PY) -m pytest tests/triton/compiled -n 2

lint: $(STAMPS)/lint $(STAMPS)/build $(STAMPS)/test $(STAMPS)/demo $(STAMPS)/integrations ## checks style and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)
	find csrc -type f | xargs $(dir $(PY))clang-format --dry-run -Werror

bench: $(STAMPS)/build $(STAMPS)/demo ## measures this machine
	$(PY) -m bench

doctor: $(STAMPS)/build ## says which backends run here, and why the others do not
	$(PY) -m fused_losses

gpu-check: $(STAMPS)/build ## on a GPU machine: every loss on every backend, then the measurements
	$(PY) -m fused_losses check
	$(PY) -m pytest -n 8 --device cuda
	compute-sanitizer --kernel-name kernel_substring=fused_losses --error-exitcode 1 $(PY) -m fused_losses check --backend cuda
	$(PY) -m bench --device cuda

build: $(STAMPS)/build

$(STAMPS)/environment: requirements/build.txt
ifneq ($(PYTHON_ENV),system)
	@test -x $(PY) || $(PYTHON) -m venv .venv || { echo "python3-venv is missing: apt-get install python3-venv"; exit 1; }
	$(INSTALL) --upgrade pip
	$(INSTALL) -r requirements/build.txt
endif
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/build: $(STAMPS)/environment $(SOURCES)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

$(STAMPS)/integrations: INSTALL += --no-deps

$(STAMPS)/%: requirements/%.txt $(STAMPS)/environment
	$(INSTALL) -r $<
	@touch $@
