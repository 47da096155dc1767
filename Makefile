# On a fresh machine with Python 3.10 or newer: `make demo`, `make test`. Each does its own set-up in .venv.
PYTHON ?= python3
BIN := .venv/bin
WORKERS := --numprocesses 3 --dist worksteal  # some wait: for retries, for other processes
TESTS_WITHOUT_TORCH := tests/spec tests/arithmetic tests/checkpoints tests/planning tests/monitor tests/diagnosis

# With bytecode files, pytest need not rewrite each test's assertions in each of its processes.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-no-torch test-all test-vllm mutations gpu-test bench clean

demo: .venv/runtime
	$(BIN)/qwen-vram demo

# What each change must pass: 14 minutes on two idle cores without AVX-512 (2026-12-01); 8 are the aim.
test: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -p tests.helpers.no_torch -m "no_torch and not full" \
		$(WORKERS) $(TESTS_WITHOUT_TORCH)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not full and not no_torch and not vllm" $(WORKERS)

# The part that needs no torch, on a machine that has none. `make test` runs it with torch blocked.
test-no-torch: .venv/no-torch/done
	.venv/no-torch/bin/python -m pytest -m "no_torch and not full" $(TESTS_WITHOUT_TORCH)

# Whole products, all random seeds, more repetitions: an hour.
test-all: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not vllm" $(WORKERS)

# A real vLLM, in an environment of its own of 3.4 GB.
test-vllm: .venv/dev .venv/vllm/bin/vllm
	$(BIN)/python -m pytest -m vllm tests/vllm

# Faults put into copies of the code, one in each mechanism: the tests must find each. `--all` runs the whole suite.
mutations: .venv/dev
	$(BIN)/python -m tests.mutations

# On a machine with a GPU. A process for each file, for tests measure what theirs takes.
gpu-test: .venv/dev
	for file in $$(grep -rl "mark.gpu" tests --include="test_*.py"); do \
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

.venv/no-torch/done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv/no-torch
	$(@D)/bin/python -m pip install --quiet --constraint constraints.txt \
		huggingface_hub nvidia-ml-py psutil typer rich pytest
	$(@D)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

.venv/vllm/bin/vllm: | .venv/dev
	$(BIN)/qwen-vram serve --setup-vllm .venv/vllm

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
