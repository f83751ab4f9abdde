# Each target sets up what it needs: `make demo` in a fresh clone is enough.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint lock clean help

help:            ## show the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/:/' | column -t -s:

$(READY): requirements.lock pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --editable .
	@touch $@

demo: $(READY)   ## train the embedded demo, from a base model to registered adapters
	$(BIN)/python -m flows.pipeline demo

test: $(READY)   ## run the whole test suite
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: $(READY)   ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy coalora tasks flows

lock: $(READY)   ## resolve requirements.lock anew from pyproject.toml (needs uv)
	uv pip compile pyproject.toml --extra pipeline --extra dev --python-version 3.11 --no-annotate --no-header \
	  | grep --invert-match --extended-regexp '^(nvidia-|cuda-|triton==)' > $(VENV)/lock
	{ sed -n '/^#/p' requirements.lock; cat $(VENV)/lock; } > $(VENV)/lock.new
	mv $(VENV)/lock.new requirements.lock

clean:           ## remove the virtual environment and everything computed
	rm -rf $(VENV) .coalora runs outputs
