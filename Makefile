# `make demo` and `make test` set up everything they need in $(VENV).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-oldest lint bench soak docs figures quality wheel clean

demo: $(VENV)/.installed
	$(BIN)/python examples/compare_with_autonormal.py --dataset digits

test: lint
	$(BIN)/python -m pytest --numprocesses 2

# The oldest versions that setup.py admits, with a Python that they know (3.10 to 3.12).
test-oldest:
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --constraint tests/oldest.txt --editable ".[dev]"
	$(VENV)-oldest/bin/python -m pytest --numprocesses 2

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/training_step.py

soak: $(VENV)/.installed
	$(BIN)/python benchmarks/soak.py

quality: $(VENV)/.installed
	$(BIN)/python benchmarks/quality.py --data-dir $(DATA_DIR) --quick

# Builds the sdist, the wheel from it, and runs the quick start with nothing of the repository but the wheel.
wheel: $(VENV)/.installed
	rm -rf build dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m pip install --quiet --no-deps --target build/alone dist/pyro_ssvi-*.whl
	cd build && PYTHONPATH=alone ../$(BIN)/python -c "import pyro_ssvi; print(pyro_ssvi.__file__)"
	cd build && PYTHONPATH=alone ../$(BIN)/python -m pytest -q ../tests/test_docs.py -k quickstart

docs: $(VENV)/.installed-docs
	$(BIN)/sphinx-build -W -b html docs docs/_build/html

figures: $(VENV)/.installed
	$(BIN)/python docs/figures.py

$(VENV)/.installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info docs/_build
