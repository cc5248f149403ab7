# Set-up, demo, tests and checks. Each target makes what it needs.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
JOBS   ?= 2

export OMP_WAIT_POLICY := passive
export TOKENIZERS_PARALLELISM := false

.PHONY: demo picture notebooks test test-fast check docs format clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	# torch first and alone: with it installed nothing asks for its CUDA packages
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[demo,dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/concept-unlearn fetch smollm2
	$(BIN)/concept-unlearn run configs/quickstart.yaml

# The README's: what the demo leaves beside its report
picture: demo
	cp runs/quickstart/tradeoff.svg docs/pictures/quickstart.svg

notebooks: $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[demo,notebooks]'
	$(BIN)/concept-unlearn fetch smollm2
	$(BIN)/python scripts/run_notebooks.py

test: $(STAMP)
	$(BIN)/concept-unlearn fetch smollm2
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

test-fast: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m "not slow"

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/python tests/doc_blocks.py # what is run of these pages by the tests, and what is not
	$(BIN)/mkdocs build --strict

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) site .mypy_cache .ruff_cache .pytest_cache
