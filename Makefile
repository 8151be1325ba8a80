# `make demo` and `make test` set up everything they need in $(VENV).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-oldest lint bench soak docs figures quality wheel audit clean

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

# Builds the sdist, and the wheel from it. The quick start runs with each, in an environment that
# has nothing of the repository, and of $(VENV) only the dependencies.
wheel: $(VENV)/.installed
	rm -rf build dist
	$(BIN)/python -m build .
	set -e; for file in dist/*.tar.gz dist/*.whl; do \
	    $(BIN)/python -m venv --clear build/alone; \
	    build/alone/bin/python -m pip install --quiet --no-deps $$file; \
	    $(BIN)/python -c "import site; print(site.getsitepackages()[0])" \
	        > $$(echo build/alone/lib/python*/site-packages)/dependencies.pth; \
	    (cd build && alone/bin/python -m pytest -q ../tests/test_docs.py -k quickstart && \
	        alone/bin/python -c "import pyro_ssvi as p; assert '/alone/' in p.__file__, p.__file__"); \
	done

# Known vulnerabilities of all that is installed. It fails, too, where they cannot be looked up.
audit: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet pip-audit
	mkdir -p build
	$(BIN)/python -m pip freeze --exclude-editable > build/installed.txt
	$(BIN)/pip-audit --strict --no-deps --disable-pip --requirement build/installed.txt

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
