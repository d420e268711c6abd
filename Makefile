# make demo    train, evaluate and use a small model on a synthetic corpus it builds (minutes, two cores)
# make test    all tests
# make lint    ruff and mypy
# make parity  how far each architecture, head and format is from its reference, into docs/parity.md (minutes)
# make soak    hundreds of kills and thousands of damaged files, into docs/reliability.md (hours at most)
# Each makes .venv first, with Python 3.11 or newer (PYTHON=... chooses one).

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.PHONY: demo test lint parity soak clean

demo: .venv/.demo
	OMP_NUM_THREADS=1 $(BIN)/python examples/demo.py

# Three workers, a file at a time: what takes minutes comes first, and keeps one of them busy to the end.
test: .venv/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

lint: .venv/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

parity: .venv/.test
	$(BIN)/python tests/peers/parity.py --write docs/parity.md

soak: .venv/.test
	$(BIN)/python tests/soak/run.py

# A stamp per extra: what is installed already is not asked for again.
.venv/.demo .venv/.test .venv/.lint: .venv/.%: .venv/.made setup.cfg pyproject.toml
	@echo "installing ser[$*] into .venv (the first time downloads PyTorch, which takes minutes)"
	$(PIP) --editable '.[$*]'
	@touch $@

.venv/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		"ser needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	@touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
