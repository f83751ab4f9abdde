# Each target sets up what it needs: `make demo` in a fresh clone is enough.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo up down status test test-e2e test-gptq lint bench lock clean help

help:            ## show the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/:/' | column -t -s:

$(READY): requirements.lock pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --editable .
	@touch $@

demo: $(READY)   ## train the embedded demo, from a base model to registered adapters
	$(BIN)/python -m flows.pipeline demo

up: $(READY)     ## start Prefect, MLflow, an S3 store and a worker on this machine (loopback)
	$(BIN)/python -m infra.local up

down: $(READY)   ## end what `make up` started
	$(BIN)/python -m infra.local down

status: $(READY) ## show how the stack is
	$(BIN)/python -m infra.local status

test: $(READY)   ## run the test suite
	$(BIN)/python -m pytest -m 'not servers' --numprocesses 2 --dist loadfile

test-e2e: $(READY)   ## run the tests on real servers, to a run that is killed and reproduced elsewhere
	$(BIN)/python -m pytest tests/e2e tests/flows tests/infra tests/tasks -m servers --numprocesses 2 --dist loadfile

# Beside the environment and not in it: PEFT imports gptqmodel wherever it finds it.
$(VENV)/gptq/.ready: $(READY) requirements-gptq.lock
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --upgrade --target $(VENV)/gptq \
	  --requirement requirements-gptq.lock
	@touch $@

test-gptq: $(VENV)/gptq/.ready   ## run the tests of scheme gptq against gptqmodel (77 MB more)
	PYTHONPATH=$(VENV)/gptq $(BIN)/python -m pytest tests/coalora/quant/gptq/test_scheme.py

bench: $(READY)  ## run every benchmark, in under 15 minutes on two cores (benchmarks/results/*.json)
	for name in switch step memory search evaluate; do $(BIN)/python -m benchmarks.$$name --quick || exit 1; done
	for name in neighbours allocation; do $(BIN)/python -m benchmarks.$$name || exit 1; done
	$(BIN)/python -m benchmarks.recovery pydoc --seeds 1 --steps 50 --methods none shared ours "one LoRA each"

lint: $(READY)   ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy coalora pipeline tasks flows benchmarks infra

lock: $(READY)   ## resolve requirements.lock anew from pyproject.toml (needs uv)
	uv pip compile pyproject.toml --extra pipeline --extra dev --python-version 3.11 --no-annotate --no-header \
	  | grep --invert-match --extended-regexp '^(nvidia-|cuda-)' > $(VENV)/lock
	{ sed -n '/^#/p' requirements.lock; cat $(VENV)/lock; } > $(VENV)/lock.new
	mv $(VENV)/lock.new requirements.lock

clean:           ## remove the virtual environment and everything computed
	rm -rf $(VENV) .coalora runs outputs
