# Two commands do all the set-up: `make demo` and `make test`. `make test-lerobot` has an environment of its own.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
LEROBOT_VENV := .venv-lerobot
# Without a GPU, torch's own index has a build that is gigabytes smaller. Where it cannot be reached, pip goes on without.
CPU_INDEX := $(if $(shell command -v nvidia-smi),,--extra-index-url https://download.pytorch.org/whl/cpu)

.PHONY: demo test test-lerobot lint clean

demo: $(INSTALLED)
	bash launch/demo.sh $(BIN)/dysl

test: $(INSTALLED)
	$(BIN)/pytest -n 2 --dist worksteal

# Against LeRobot's own driver; LEROBOT_PYTHON=... names a Python 3.12 that is not found by itself.
test-lerobot:
	bash launch/lerobot_env.sh $(LEROBOT_VENV) $(LEROBOT_PYTHON)
	$(LEROBOT_VENV)/bin/python -m pytest tests/lerobot

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("dysl-vla needs Python 3.11 or later; run make PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install --constraint constraints.txt --no-deps $(CPU_INDEX) torch
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) $(LEROBOT_VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis runs/demo
