# Targets set up what they need: a virtual environment in .venv, the dependencies, and minisgl itself, installed the
# ordinary way. Each part is done again only when what it depends on has changed.

PYTHON ?= python3
PROMPT ?= Why is the sky blue? Answer in two sentences.
MODEL  ?= smollm2
export PROMPT

VENV    := .venv
PY      := $(VENV)/bin/python
PIP     := $(PY) -m pip install --disable-pip-version-check
GPU     := $(shell command -v nvidia-smi)
PINS    := $(if $(GPU),,-c constraints-cpu.txt)
GROUPS  := base cmake $(if $(GPU),cuda)
# Folders too, so that a deleted file counts as a change.
SOURCES := $(shell find src csrc -not -name '*.pyc' -not -name '__pycache__')
C_FILES  = $(shell find benchmarks csrc src tests -name '*.cpp' -o -name '*.hpp' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help demo test test-gpu lint format bench profile
.DELETE_ON_ERROR:

help:
	@echo 'make demo      ask the default model a question (PROMPT="...", MODEL=...)'
	@echo 'make test      the tests that any machine can run (ARGS="..." goes to pytest)'
	@echo 'make test-gpu  the tests that need an NVIDIA GPU'
	@echo 'make lint      formatting, types, the direction of imports, the line budget'
	@echo 'make format    formats the sources'
	@echo 'make bench     what the engine reaches on this machine, beside its floor (GPU) or its goals (CPU)'
	@echo 'make profile   the laboratory: measures this machine, writes out/profile/report (ARGS=--quick: two minutes)'
	@echo 'PYTHON=python3.12 chooses the interpreter of a new .venv'

demo: $(VENV)/package.stamp
	@$(PY) -m minisgl generate --model '$(MODEL)' --temperature 0 -- "$$PROMPT"

test: $(VENV)/package.stamp $(VENV)/dev.stamp
	$(PY) -m pytest $(ARGS)

test-gpu: $(VENV)/package.stamp $(VENV)/dev.stamp
	$(PY) -m pytest -m cuda $(ARGS)

bench: $(VENV)/package.stamp
	$(PY) benchmarks/$(if $(GPU),bench_engine,bench_product).py $(ARGS)

profile: $(VENV)/package.stamp $(VENV)/profile.stamp
	PYTHON=$(PY) scripts/06_full_pipeline.sh $(ARGS)

lint: $(VENV)/base.stamp $(VENV)/dev.stamp
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/clang-format --dry-run -Werror $(C_FILES)
	$(PY) tools/check_imports.py
	$(PY) tools/count_lines.py
	$(VENV)/bin/mypy

format: $(VENV)/dev.stamp
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format
	$(VENV)/bin/clang-format -i $(C_FILES)

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	    f"minisgl needs Python 3.11 or later, $(PYTHON) is {sys.version.split()[0]}; try: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/base.stamp: pyproject.toml constraints-cpu.txt tools/requirements.py | $(VENV)/bin/pip
	$(PY) tools/requirements.py build > $(VENV)/build.txt
	$(PIP) -q $(PINS) -r $(VENV)/build.txt
	$(PY) tools/requirements.py $(GROUPS) > $(VENV)/base.txt
	$(PIP) $(PINS) -r $(VENV)/base.txt
	@touch $@

$(VENV)/dev.stamp: $(VENV)/base.stamp
	$(PY) tools/requirements.py dev > $(VENV)/dev.txt
	$(PIP) $(PINS) -r $(VENV)/base.txt -r $(VENV)/dev.txt
	@touch $@

$(VENV)/profile.stamp: $(VENV)/base.stamp
	$(PY) tools/requirements.py profile > $(VENV)/profile.txt
	$(PIP) $(PINS) -r $(VENV)/base.txt -r $(VENV)/profile.txt
	@touch $@

# Not editable: what runs is what was installed, and what was installed is what the tree holds now. No cache: pip
# may keep the wheel of a folder by the folder's name.
$(VENV)/package.stamp: $(VENV)/base.stamp $(SOURCES) CMakeLists.txt README.md LICENSE
	$(PIP) -q --no-cache-dir --no-deps --no-build-isolation --force-reinstall .
	@touch $@
