# make demo: the main job on a slide made on the spot.  make test: the fast tests.
# Both set up .venv themselves when there is none. LOCAL=1 or CI is not needed.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST := $(BIN)/python -m pytest

.PHONY: demo test test-slow test-gpu lint fuzz bench peers clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	# The CPU build where the registry or the machine has one; the default build elsewhere.
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[openvino,s3,geojson,wsi,notebook,test,lint]"
	touch $(READY)

demo: $(READY)
	$(BIN)/python workflows/demo/demo.py

test: $(READY)
	$(PYTEST) -m "not slow and not gpu"

test-slow: $(READY)
	$(PYTEST) -m "slow and not gpu"

test-gpu: $(READY)
	$(PYTEST) -m gpu

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

fuzz: $(READY)
	$(BIN)/python -m tests.fuzz.campaign -n 50000

bench: $(READY)
	$(BIN)/tilepipe bench

# The alternatives on the same slide and weights; benchmarks/peers/README.md.
PEERS_SIZE ?= 8192
PEERS_REPEAT ?= 1
PEERS_ARGS ?=
peers: $(READY)
	$(BIN)/python benchmarks/peers/run.py --size $(PEERS_SIZE) --repeat $(PEERS_REPEAT) $(PEERS_ARGS)

clean:
	rm -rf $(VENV) demo
