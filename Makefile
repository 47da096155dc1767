# On a fresh machine with Python 3.10 or newer: `make demo`, `make test`. Each does its own set-up in .venv.
PYTHON ?= python3
BIN := .venv/bin
WORKERS := --numprocesses 3 --dist worksteal  # some wait: for retries, for other processes

.PHONY: demo test test-all gpu-test bench clean

demo: .venv/runtime
	$(BIN)/qwen-vram demo

# What each change must pass: on two idle cores at most 8 minutes.
test: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not full" $(WORKERS)

# Whole products, all random seeds, more repetitions: an hour.
test-all: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/pytest $(WORKERS)

# On a machine with a GPU. A process for each file, for tests measure what theirs takes.
gpu-test: .venv/dev
	for file in $$(grep -l "mark.gpu" tests/test_*.py); do \
		$(BIN)/pytest -q -m gpu -p no:cacheprovider "$$file" || exit 1; \
	done

bench: .venv/dev
	$(BIN)/python benchmarks/import_and_estimate.py

# Installs are stamped, so that a second run starts at once; a failed install leaves no stamp.
.venv/runtime: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/dev: .venv/runtime
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[gptq]" \
		|| echo "GPTQModel does not install here (it needs a C compiler): its tests are skipped"
	touch $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
