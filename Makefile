# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install quickstart test test-long lint format docs bench kill-test fuzz soak test-oldest lock clean

install: $(VENV)/.installed

# The versions that the tests were run with. torch and torchvision are asked for together, so that pip resolves a pair
# that fits.
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint requirements/tested.txt
$(VENV)/.installed: pyproject.toml requirements/tested.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch torchvision
	$(PIP) --editable '.[dev]'
	touch $@

quickstart: install
	$(BIN)/atdiff quickstart --out runs/quickstart

# A process for each core, up to four, since each holds torch and diffusers; whole files, so that their fixtures are shared.
PYTEST := -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile
test: install
	$(BIN)/python $(PYTEST) --ignore tests/long

# What takes longer than a change can wait for.
test-long: install
	$(BIN)/python -m pytest tests/long

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@if curl --fail --silent --max-time 10 --output /dev/null https://pypi.org/pypi/pip/24.0/json; \
	then $(BIN)/pip-audit --local --skip-editable --progress-spinner off; \
	else echo "No registry answers: the dependencies are not audited."; fi

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The site, in site/; a warning is an error. With --quiet, warnings would neither be seen nor counted.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: install
	$(BIN)/python bench/training_speed.py
	$(BIN)/python bench/training_speed.py --channels 128 --pairs 5 --passes 1
	$(BIN)/python bench/pass_cost.py
	$(BIN)/python bench/pass_cost.py --precision bf16
	$(BIN)/python bench/optimizer_cost.py
	$(BIN)/python bench/consistency_cost.py
	$(BIN)/python bench/sampling_speed.py
	$(BIN)/python bench/cifar_speed.py --pairs 3 --passes 1
	$(BIN)/python bench/many_runs.py
	$(BIN)/python bench/growth.py
	$(BIN)/python bench/latent_memory.py
	$(BIN)/python bench/evaluation_cost.py

kill-test: install
	$(BIN)/python tests/long/kills.py --kills 100 --passes 30

fuzz: install
	$(BIN)/python tests/long/fuzz.py --cases 1000

soak: install
	$(BIN)/python tests/long/soak.py --minutes 30

# The oldest versions that pyproject.toml allows, in an environment of their own; needs uv.
test-oldest:
	uv venv --quiet --allow-existing --python 3.11 .venv-oldest
	uv pip install --quiet --python .venv-oldest/bin/python --requirement requirements/oldest.txt
	uv pip install --quiet --python .venv-oldest/bin/python --no-deps --editable .
	.venv-oldest/bin/python $(PYTEST) --ignore tests/long

lock:
	uv pip compile pyproject.toml --extra dev --universal --python-version 3.10 --no-annotate --quiet \
		--custom-compile-command "make lock" --output-file requirements/tested.txt
	# The oldest datasets does not know the strings of pandas 3.
	echo "pandas==2.2.*" | uv pip compile pyproject.toml - --extra dev --resolution lowest-direct --python-version 3.11 --no-annotate --quiet \
		--custom-compile-command "make lock" --output-file requirements/oldest.txt

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
