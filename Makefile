# Every target sets up what it needs: python3 (3.11 or newer) and make are enough.

PYTHON ?= python3
UV_VERSION := 0.13.8
UV := .uv/bin/uv
READY := .venv/.ready
BIN := .venv/bin
# Two test workers; more threads in each would only take turns.
WORKERS := 2
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: demo test test-slow fuzz check format bench lock
.DELETE_ON_ERROR:

demo: $(READY)
	@$(BIN)/explain2me demo

test: check
	@$(ONE_THREAD) $(BIN)/pytest -n $(WORKERS) --dist worksteal -m "not slow"

test-slow: $(READY)
	@$(ONE_THREAD) $(BIN)/pytest -n $(WORKERS) --dist worksteal -m slow

fuzz: $(READY)
	@$(ONE_THREAD) $(BIN)/python tests/faults/fuzz.py --count 10000 --seed 0

check: $(READY)
	@$(BIN)/ruff format --quiet --check
	@$(BIN)/ruff check --quiet
	@$(BIN)/mypy --no-error-summary

format: $(READY)
	@$(BIN)/ruff format
	@$(BIN)/ruff check --fix

bench: $(READY)
	@$(BIN)/python benchmarks/bench.py
	@$(BIN)/python benchmarks/training.py

# A folder of local wheels must not get into the lock.
lock: $(UV)
	@env -u UV_FIND_LINKS $(UV) pip compile --quiet --universal --generate-hashes --all-extras --group dev \
		--python-version 3.11 --custom-compile-command "make lock" pyproject.toml --output-file requirements.lock

$(READY): requirements.lock pyproject.toml | $(UV)
	@echo "installing into .venv: some 7 GB, a few minutes" >&2
	@test -x $(BIN)/python || $(UV) venv --quiet --python $(PYTHON) .venv
	@$(UV) pip sync --quiet --python $(BIN)/python --require-hashes --compile-bytecode requirements.lock
	@$(UV) pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

# A python3 without venv (Debian keeps it in a package of its own) may still have pip, and then pip is enough.
$(UV):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is missing or older than 3.11; install Python 3.11 or newer, or name one: make PYTHON=python3.12" >&2; exit 1; }
	@rm -rf .uv
	@if $(PYTHON) -m venv .uv >/dev/null 2>&1; then .uv/bin/python -m pip install --quiet uv==$(UV_VERSION); \
	elif rm -rf .uv; $(PYTHON) -m pip --version >/dev/null 2>&1; then $(PYTHON) -m pip install --quiet --target .uv uv==$(UV_VERSION); \
	else echo "$(PYTHON) has neither venv nor pip; on Debian and Ubuntu install the package python3-venv" >&2; exit 1; fi
