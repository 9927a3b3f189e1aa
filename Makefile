# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install quickstart test lint format bench kill-test fuzz soak clean

install: $(VENV)/.installed

# torch and torchvision are asked for together, so that pip resolves a pair that fits.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch torchvision
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

quickstart: install
	$(BIN)/atdiff quickstart --out runs/quickstart

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: install
	$(BIN)/python bench/training_speed.py
	$(BIN)/python bench/training_speed.py --channels 128 --pairs 5 --passes 1
	$(BIN)/python bench/pass_cost.py
	$(BIN)/python bench/pass_cost.py --precision bf16
	$(BIN)/python bench/optimizer_cost.py
	$(BIN)/python bench/consistency_cost.py
	$(BIN)/python bench/sampling_speed.py
	$(BIN)/python bench/many_runs.py
	$(BIN)/python bench/growth.py
	$(BIN)/python bench/latent_memory.py
	$(BIN)/python bench/evaluation_cost.py

kill-test: install
	$(BIN)/python tests/kills.py --kills 100

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
