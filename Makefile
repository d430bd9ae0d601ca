# Every target works in a fresh clone: the first of them makes .venv and installs into it.
PYTHON ?= python3
TRIALS ?= 100
ROUNDS ?= 10
VENV := .venv
# As many processes as `tests/conftest.py` says, a whole file in each: what a file has trained or started is there once.
PYTEST := $(VENV)/bin/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

.PHONY: search solve test coverage soak proof bench scaling lint clean

search: $(VENV)/installed
	$(VENV)/bin/nas-mnist search --trials $(TRIALS)

solve: $(VENV)/installed
	$(VENV)/bin/nas-mnist solve --trials $(TRIALS)

test: $(VENV)/installed
	$(PYTEST)

coverage: $(VENV)/installed
	$(PYTEST) --cov --cov-report term-missing:skip-covered --cov-report html

soak: $(VENV)/installed
	$(VENV)/bin/python tests/soak/soak.py --rounds $(ROUNDS)

proof: $(VENV)/installed
	$(VENV)/bin/python tests/proof/proof.py

bench: $(VENV)/installed
	$(VENV)/bin/python tests/benchmarks/bench.py

scaling: $(VENV)/installed
	$(VENV)/bin/python tests/benchmarks/scaling.py

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) build

$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; this is $$($(PYTHON) --version): make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check --quiet --editable '.[dev]'
	@touch $@
