# From a fresh clone: `make quickstart` runs the whole loop on a real corpus, `make test` every test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-all lint bench ui clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# A current pip resolves these packages in seconds; an older one backtracks for minutes. torch comes first with its exact
# version, or another package pulls a newer build with gigabytes of accelerator libraries.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mmflow needs Python 3.11 or newer: make PYTHON=python3.11 …")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (minutes, once)"
	@$(BIN)/pip install --quiet --upgrade "$$(grep '^pip==' constraints.txt)"
	@$(BIN)/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	@$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[quickstart,ui,onnx,dev]'
	@# Tests compare with open_clip's reader. Its own requirements would install another torchvision and timm.
	@$(BIN)/pip install --quiet --no-deps "$$(grep '^open-clip-torch==' constraints.txt)"
	@touch $@

quickstart: $(STAMP) ## the whole loop on a small real corpus, on this machine
	@$(BIN)/mmflow quickstart

# Two processes; each starts one Ray for all its tests.
test: $(STAMP) ## every test but the slow sweeps
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-all: $(STAMP) ## every test
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m ''

lint: $(STAMP) ## formatting, lint and types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

bench: $(STAMP) ## speed beside peers, written to tests/benchmarks/RESULTS.md
	@$(BIN)/python -m tests.benchmarks

ui: $(STAMP) ## Dagster's pages on the quickstart's runs
	@mkdir -p workspace/quickstart/dagster
	@DAGSTER_HOME=$(CURDIR)/workspace/quickstart/dagster $(BIN)/dagster-webserver -m pipelines.definitions

clean: ## the environment and the workspace
	rm -rf $(VENV) workspace
