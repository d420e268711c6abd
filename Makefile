# make demo    train, evaluate and use a small model on a synthetic corpus it builds (minutes, two cores)
# make test    all tests
# make lint    ruff and mypy
# make parity  how far each architecture, head and format is from its reference, into docs/parity.md (minutes)
# make protocols  all folds of paper10 and session5 on a made-up IEMOCAP of the real size (half an hour)
# make bench   speed and memory beside transformers on a few turns, into runs/benchmarks (ten minutes, two cores)
# make bench-full  the same on 48 turns, three times in turn, into docs/performance.md (hours)
# make facts   what a reader meets in the code: lines, the longest function, complexity (PACKAGE=ser chooses)
# make wheel-test  build the wheel, install it with everything downloaded, train and recognise (minutes)
# make soak    hundreds of kills and thousands of damaged files, into docs/reliability.md (hours at most)
# Each makes .venv first, with Python 3.11 or newer (PYTHON=... chooses one).

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.PHONY: demo test lint parity bench bench-full protocols facts wheel-test soak clean

demo: .venv/.demo
	OMP_NUM_THREADS=1 $(BIN)/python -m ser demo

# Three workers, a file at a time: what takes minutes comes first, and keeps one of them busy to the end.
test: .venv/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

lint: .venv/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

parity: .venv/.test
	$(BIN)/python tests/peers/parity.py --write docs/parity.md

BENCHMARKS := training inference startup scaling
bench: .venv/.test
	for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py || exit; done

FULL := runs/benchmarks-full
bench-full: .venv/.test
	$(BIN)/python benchmarks/startup.py --repeats 15 --out $(FULL)
	for name in training inference scaling; do \
		$(BIN)/python benchmarks/$$name.py --turns 48 --repeats 3 --out $(FULL) || exit; done
	$(BIN)/python benchmarks/common.py $(BENCHMARKS:%=$(FULL)/%.json) --write docs/performance.md

# The release is licensed, so its folders, names and labels are real and its sounds are not: figures mean nothing.
TREE := runs/iemocap-tree
CROSS := $(BIN)/python -m ser crossval --data $(TREE)/data --root $(TREE)/release \
	--init small --epochs 2 --rate 1e-3
protocols: .venv/.test
	test -d $(TREE)/release || $(BIN)/python tests/iemocap_tree.py $(TREE)/release
	$(BIN)/python -m ser prepare $(TREE)/release --out $(TREE)/data
	OMP_NUM_THREADS=1 $(CROSS) --protocol paper10 --out $(TREE)/paper10
	OMP_NUM_THREADS=1 $(CROSS) --protocol session5 --beta 0.1 --out $(TREE)/session5

PACKAGE := ser
facts: .venv/.made
	$(BIN)/python tests/facts.py $(PACKAGE)

wheel-test: .venv/.test
	WHEEL_TEST_DOWNLOADS=1 $(BIN)/python -m pytest tests/test_wheel.py

soak: .venv/.test
	$(BIN)/python tests/soak/run.py

# A stamp per extra: what is installed already is not asked for again.
.venv/.demo .venv/.test .venv/.lint: .venv/.%: .venv/.made setup.cfg pyproject.toml
	@echo "installing ser with the extra $* into .venv (the first time downloads PyTorch, which takes minutes)"
	$(PIP) --editable '.[$*]'
	@touch $@

.venv/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		"ser needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	@touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
