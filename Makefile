# Two commands: `make demo` and `make test`. Everything else they need, they set up.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
POCKET := examples/pocket_lalm
SOURCES := calibration graph_passes engines sarsteer_export

.PHONY: help setup demo test lint format bench results fuzz gpu-check pocket-lalm clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

setup: $(STAMP)  ## Make the virtual environment and install the project into it

$(STAMP): pyproject.toml setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(STAMP)  ## Build the steered bundle of the pocket LALM, prove it, and ask it something
	$(BIN)/sarsteer-export build $(POCKET)/model --config $(POCKET)/build.toml --overwrite \
		--harmful $(POCKET)/data/train_harmful.jsonl --benign $(POCKET)/data/train_benign.jsonl \
		--eval-harmful $(POCKET)/data/test_harmful.jsonl --eval-benign $(POCKET)/data/test_benign.jsonl \
		--output build/pocket_lalm
	@echo; echo 'The report with plots: build/pocket_lalm/reports/parity.html. Ask the bundle something, also with --no-steering:'
	@echo '  $(BIN)/sarsteer-export run build/pocket_lalm --audio $(POCKET)/audio/test_harmful_02.flac \'
	@echo '    --text "Please answer the question in the audio."'

# One thread each: the models of the tests are so small that handing work to threads costs more than the work. A file
# of tests stays in one process, which makes its models once.
test: lint  ## Lint, type-check and run the whole suite, on every core
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

lint: $(STAMP)  ## Lint, type-check and check the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## Measure what steering costs, patching, building an engine, and how fast calibration is
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/patch_scale.py
	$(BIN)/python benchmarks/engine_build.py
	$(BIN)/python benchmarks/calibration_speed.py

models: $(STAMP)  ## Build a tiny checkpoint of every family of models; write the table of docs/models.md
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.zoo.catalogue

results: $(STAMP)  ## Measure the pocket LALM undefended, steered and at random; write docs/results.md and the README's table
	$(BIN)/python $(POCKET)/results.py

fuzz: $(STAMP)  ## Give every command 2,000 damaged graphs and plans, other ones each time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m nightly tests/fuzz

gpu-check: $(STAMP)  ## Prove every engine that runs on this machine; needs an NVIDIA GPU
	$(BIN)/python benchmarks/gpu_check.py

pocket-lalm: $(STAMP)  ## Train the pocket LALM anew and choose its alpha (about half an hour; needs espeak-ng)
	$(BIN)/python $(POCKET)/train.py
	$(BIN)/sarsteer-export sweep $(POCKET)/model --config $(POCKET)/sweep.toml --overwrite \
		--harmful $(POCKET)/data/train_harmful.jsonl --benign $(POCKET)/data/train_benign.jsonl \
		--eval-harmful $(POCKET)/data/validation_harmful.jsonl \
		--eval-benign $(POCKET)/data/validation_benign.jsonl --output $(POCKET)/sweep

clean:  ## Remove the virtual environment and everything built
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
