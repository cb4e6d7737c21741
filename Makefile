# make quickstart   environment, data, training, evaluation, table
# make test         the tests
# make test-all     these, and the slow ones: processes under each launcher, killed and resumed
# make test-oldest  the adapter's tests with the oldest peft and transformers that it supports, in an environment of their own
# make test-newest  the same with the newest that are published
# make test-integrations  the plug-ins with the newest ms-swift, axolotl and lmms-eval, in environments of their own
# make lint         ruff and mypy
# make bench        what the adapter is held to in time and memory; BENCH=LEVEL another level, ARGS="--help" its options
# make docs         the documentation as a site, in site/

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/quickstart
BENCH ?= bars
CONFIG ?= configs/quickstart/audio_visual_text.yaml

# The lower ends of the ranges in pyproject.toml.
OLDEST ?= peft==0.19.0 transformers==5.0.0
# Packages that peft and transformers choose for themselves; everything else is as in constraints.txt.
OWN_CHOICE := peft|transformers|accelerate|huggingface_hub|tokenizers|safetensors|typer

# Threads that spin briefly and then sleep: endless spinning is an order of magnitude slower on a busy machine, and sleeping at
# once a third slower on an idle one (a step of the quickstart: 1.7 s against 1.1 s on 2 cores).
export GOMP_SPINCOUNT ?= 2000

.PHONY: quickstart test test-all test-oldest test-newest test-integrations lint format bench docs clean
.DELETE_ON_ERROR:

quickstart: $(VENV)/.demo
	$(BIN)/moka train $(CONFIG) output.dir=$(RUN) --overwrite
	$(BIN)/moka eval $(RUN)
	@echo 'ask it:         $(BIN)/moka generate $(RUN) --image digit.png --audio digit.wav "What is the sum of both digits?"'
	@echo 'open its page:  $(BIN)/pip install -c constraints.txt gradio && $(BIN)/moka demo $(RUN)'
	@echo 'diagnose it:    $(BIN)/moka diagnose $(RUN)'

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -q -m "not slow"

test-all: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -q

test-oldest: $(VENV)-oldest/.versions
	OMP_NUM_THREADS=1 $(VENV)-oldest/bin/python -m pytest -n 2 --dist loadfile -q -m "not slow" tests/adapter

# Upgrades first, every time: what is newest changes.
test-newest: $(VENV)-newest/.versions
	$(VENV)-newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade -c $(VENV)-newest/constraints.txt peft transformers accelerate
	OMP_NUM_THREADS=1 $(VENV)-newest/bin/python -m pytest -n 2 --dist loadfile -q -m "not slow" tests/adapter tests/modeling tests/test_inference.py

# Each program in an environment of its own, as their requirements exclude each other; not part of the other tests.
test-integrations: $(VENV)-ms-swift/.installed $(VENV)-axolotl/.installed $(VENV)-lmms-eval/.installed
	$(VENV)-ms-swift/bin/python -m pytest -q tests/external/test_ms_swift.py
	$(VENV)-axolotl/bin/python -m pytest -q tests/external/test_axolotl.py
	$(VENV)-lmms-eval/bin/python -m pytest -q tests/external/test_lmms_eval.py

$(VENV)-ms-swift/.installed: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check ms-swift -e . pytest soundfile
	@touch $@

# Without its requirements: the pinned and the few that training needs are named, for all of them need a GPU's libraries.
$(VENV)-axolotl/.installed: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps axolotl axolotl-contribs-lgpl axolotl-contribs-mit
	$(@D)/bin/python -c 'from importlib.metadata import requires; print(*(r for r in requires("axolotl") if r.split("==")[0] in ("transformers", "peft", "accelerate", "datasets", "trl", "tokenizers", "huggingface_hub")), sep="\n")' > $(@D)/pinned.txt
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r $(@D)/pinned.txt
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check addict fire colorama python-dotenv fastcore art schedulefree posthog mistral-common einops pydantic typer sentencepiece requests numba scipy tensorboard bitsandbytes evaluate wandb kernels liger-kernel -e . pytest
	@touch $@

# Without its requirements: the few that answering needs are named, for it pins an older PyAV than moka uses.
$(VENV)-lmms-eval/.installed: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo]" pytest soundfile
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps lmms-eval
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check loguru evaluate sacrebleu pytablewriter numexpr jsonlines tenacity sympy latex2sympy2 openpyxl tqdm-multiprocess httpx scikit-learn python-dotenv protobuf opencv-python-headless decord nltk
	@touch $@

lint: $(VENV)/.dev
	$(BIN)/ruff check moka tests recipes scripts
	$(BIN)/ruff format --check moka tests recipes scripts
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix moka tests recipes scripts
	$(BIN)/ruff format moka tests recipes scripts

bench: $(VENV)/.demo
	$(BIN)/python scripts/benchmark.py $(BENCH) $(ARGS)

docs: $(VENV)/.docs
	$(BIN)/moka train --help-config > docs/configuration.txt
	(echo '# Configuration'; echo; echo '```yaml'; cat docs/configuration.txt; echo '```') > docs/configuration.md
	rm docs/configuration.txt
	$(BIN)/mkdocs build --strict

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("moka needs Python 3.10 or newer; this is " + sys.version.split()[0] + ". Name another: make PYTHON=python3.12 ..." if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)

# torch first: the pinned build is installed alone, and nothing after it asks for another.
$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo]"
	@touch $@

$(VENV)/.docs: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

$(VENV)-oldest/.versions: WANTED := $(OLDEST)
$(VENV)-newest/.versions: WANTED := peft transformers
$(VENV)-oldest/.versions $(VENV)-newest/.versions: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	grep -vE '^($(OWN_CHOICE))==' constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c $(@D)/constraints.txt torch
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c $(@D)/constraints.txt -e . pytest pytest-xdist $(WANTED)
	$(@D)/bin/python -m pip freeze --exclude-editable > $@
