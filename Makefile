PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-compiled test-web test-examples test-serve test-cpp test-mmseg test-versions \
	fuzz lint gpu-check clean

# Install the package and evaluate the shipped demonstration model on generated street scenes.
demo: .venv/installed
	$(BIN)/python -m emanet_triton.eval

# Install the dev extra, check style and types, run every test: two processes of one thread each.
test: .venv/installed-dev lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# Compile every shipped tile of the kernels; `make test` compiles each kernel once in every dtype,
# if compiled.csv has rows of this Triton.
test-compiled: .venv/installed-dev
	COMPILE_EACH=tile $(BIN)/python -m pytest tests/bench/test_ahead_of_time.py

# The tests of the page in Chromium, with the extra web. SCREENSHOT is a PNG file to write.
test-web: .venv/installed-web
	$(BIN)/python -m pytest tests/web/browser.py $(if $(SCREENSHOT),--screenshot $(SCREENSHOT))

# The examples, with timm and segmentation_models_pytorch.
test-examples: .venv/installed-examples
	$(BIN)/python -m pytest tests/examples/libraries.py

# The tests of examples/serve.py in processes of their own, with the extra serve.
test-serve: .venv/installed-serve
	$(BIN)/python -m pytest tests/serve/service.py

# The programs of examples/cpp and examples/onnx_labels.py, which run exported networks.
test-cpp: .venv/installed-cpp
	$(BIN)/python -m pytest tests/deploy/cpp.py

# The tests of emanet_triton.mmseg inside mmsegmentation 0.30.0 and 1.2.2, each in its own virtual
# environment. TIMES is a folder for measured times; then nothing else runs.
test-mmseg: .venv/installed-dev
	$(BIN)/python tools/mmseg_env.py $(if $(TIMES),-s -k test_times --times $(TIMES))

# mypy and the tests with PyTorch 2.10, with the PyTorch that pip takes and with the newest PyTorch,
# each in its own virtual environment.
test-versions:
	$(PYTHON) tools/test_versions.py $(TESTS)

# Read thousands of damaged files of each kind under limits of memory and time. KINDS, FILES and SEED
# choose which files.
fuzz: .venv/installed-dev
	$(BIN)/python -m tests.fuzz --files $(or $(FILES),5000) --seed $(or $(SEED),0) $(KINDS)

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy emanet_triton

# Everything that needs a GPU, one stage of nine minutes at a time, with the packages of $(PYTHON).
# STAGE is run, profile or rows, OUT a folder for its files, ARGS more options; see docs/gpu.md.
gpu-check:
	PYTHONPATH=. $(PYTHON) -m emanet_triton.bench gpu-check --stage $(or $(STAGE),run) \
		--out $(or $(OUT),gpu-check) $(ARGS)

clean:
	rm -rf .venv .venvs build *.egg-info

# The files .venv/installed* are written last, so that make repeats an interrupted install.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

.venv/installed-web: .venv/installed-dev
	$(BIN)/python -m pip install --quiet --editable '.[dev,web]' playwright
	touch $@

.venv/installed-examples: .venv/installed-dev
	$(BIN)/python -m pip install --quiet --editable '.[dev]' timm segmentation-models-pytorch
	touch $@

.venv/installed-serve: .venv/installed-dev
	$(BIN)/python -m pip install --quiet --editable '.[dev,serve]'
	touch $@

.venv/installed-cpp: .venv/installed-dev
	$(BIN)/python -m pip install --quiet cmake
	touch $@
