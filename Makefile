# Needs only Python 3.10 or newer and make; everything is installed into .venv.
PYTHON ?= python3
VENV ?= .venv
RECIPE ?= spikegpt/quickstart
PIP_ARGS ?=

BIN := $(VENV)/bin
# -qq: errors only; old pips warn about every index that lacks a package.
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS)
FAILED = { echo "The installation failed. For a mirror, a proxy or wheels on disk set PIP_ARGS, e.g. make PIP_ARGS='--find-links wheels'"; exit 1; }

.DEFAULT_GOAL := help
.PHONY: help quickstart install dev test check bench matrix clean

help:  ## Show this list.
	@awk -F ':.*##' '/^[a-z]+:.*##/ {printf "  make %-12s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

quickstart: install  ## Install, then train, evaluate and explain a SpikeGPT on the embedded corpus (minutes, no GPU).
	@$(BIN)/spiking-lm run $(RECIPE)

install: $(VENV)/.installed  ## Install spiking-lm with all its extras into .venv.

dev: $(VENV)/.installed-dev  ## Install the tools of developers as well.

test: dev  ## Run the tests.
	@$(BIN)/python -m pytest

check: dev  ## Check style and types.
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .
	@$(BIN)/python -m mypy

bench: install  ## Time kernels and models on this machine.
	@$(BIN)/spiking-lm bench

matrix: dev  ## Run tests and wheel checks on Python 3.10 to 3.13, as far as they are installed.
	@$(BIN)/python -m nox

clean:  ## Remove .venv and everything that was built; runs stay.
	rm -rf .venv .nox build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src plugins hw tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp says that the installation is newer than pyproject.toml, so that nothing is installed twice.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "spiking-lm needs Python 3.10 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)."; \
	  echo "Name another one: make PYTHON=python3.12"; exit 1; }
	@$(BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV) || { \
	  echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@echo "Installing spiking-lm and what it needs into $(VENV). PyTorch is large: the first time takes minutes ..."
	@$(INSTALL) -e '.[all]' || $(FAILED)
	@touch $@
	@echo "Installed: $(BIN)/spiking-lm"

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing the tools of developers into $(VENV) ..."
	@$(INSTALL) -e '.[dev]' || $(FAILED)
	@touch $@
