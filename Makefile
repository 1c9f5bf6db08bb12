PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-versions fuzz lint gpu-check clean

# Install the package and evaluate the shipped demonstration model on generated street scenes.
demo: .venv/installed
	$(BIN)/python -m emanet_triton.eval

# Install the dev extra, check style, run every test: two processes of one thread each.
test: .venv/installed-dev lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# The tests with the oldest PyTorch, with what pip takes and with the newest, each in its own venv.
test-versions:
	$(PYTHON) tools/test_versions.py $(TESTS)

# Thousands of damaged files of each kind, read under limits of memory and time. KINDS, FILES and
# SEED choose others.
fuzz: .venv/installed-dev
	$(BIN)/python -m tests.fuzz --files $(or $(FILES),5000) --seed $(or $(SEED),0) $(KINDS)

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Everything that needs a GPU, a stage of nine minutes at a time, with what $(PYTHON) has. STAGE is
# run, profile or rows, OUT a folder for its files, ARGS more options; docs/gpu.md says more.
gpu-check:
	PYTHONPATH=. $(PYTHON) -m emanet_triton.bench gpu-check --stage $(or $(STAGE),run) \
		--out $(or $(OUT),gpu-check) $(ARGS)

clean:
	rm -rf .venv .venvs build *.egg-info

# The markers are written last, so that an interrupted install is done again.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@
