# Two commands: `make demo` and `make test`. Each sets up what it needs in .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow check docs bench bench-results clean

demo: .venv/ready
	$(BIN)/python examples/demo.py

test: .venv/ready
	$(BIN)/python -m pytest -m "not slow"

test-slow: .venv/ready
	$(BIN)/python -m pytest -m slow

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: .venv/ready  ## runs every code block of README.md and docs/
	$(BIN)/python -m pytest tests/test_docs.py

bench: .venv/ready  ## minutes: every computation against its baselines; runs/benchmarks
	$(BIN)/python -m benchmarks --suite quick

bench-results: .venv/ready  ## hours: what benchmarks/results/cpu holds
	$(BIN)/python -m benchmarks --suite full --out benchmarks/results/cpu
	$(BIN)/python -m benchmarks.shards
	$(BIN)/python -m benchmarks.budget --json
	$(BIN)/python -m benchmarks.cost
	$(BIN)/python -m benchmarks.stages
	$(BIN)/python -m benchmarks.transfer

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf .venv runs build *.egg-info
