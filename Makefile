# `make help` lists the targets. Each of them first makes .venv when it is missing or out of date.

# The Python that .venv is made with: python3, or else the first newer one found. To choose: `make PYTHON=/path/to/python`.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo "$$p"; exit; }; done)

# A second index for torch. PyPI's build for Linux brings several GB of CUDA libraries, so on a machine without an NVIDIA
# driver it is PyTorch's own index of CPU builds; when that cannot be reached, PyPI's build is taken after all. `make
# TORCH_INDEX= demo` asks PyPI alone.
TORCH_INDEX ?= $(shell test "$$(uname -s)" = Linux && ! command -v nvidia-smi >/dev/null && \
	echo https://download.pytorch.org/whl/cpu)

PYTEST_ARGS ?=
# A process for each core, and eight at most, since each holds torch and diffusers.
PYTEST = $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile
PROMPT ?= a blue triangle moves right on a white background
METHODS ?=
BENCHMARKS ?= quality cpu_speed
COMFYUI_PYTHON ?= python3

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs
PIP := $(BIN)/python -m pip --disable-pip-version-check

# With two OpenMP threads spinning between small operations, a small model is many times slower than with one.
export OMP_WAIT_POLICY := PASSIVE

.DEFAULT_GOAL := help
.PHONY: help install demo compare docs dist test test-all test-comfyui lint format bench bench-gpu clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /: /' | awk -F': ' '{printf "  make %-12s %s\n", $$1, $$2}'
	@echo
	@echo "  Variables: PYTHON, TORCH_INDEX, PROMPT, METHODS, PYTEST_ARGS, BENCHMARKS (see the top of the Makefile)"

install: $(STAMP) ## make .venv and install the package in it (editable), with the versions of constraints.txt

# The stamp is written last, so that an interrupted installation is taken up again.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer found; give one: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@echo "Installing into $(VENV); the first time this downloads for some minutes."
	@rm -f $(STAMP)
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt setuptools
	$(PIP) install --quiet -c constraints.txt --no-deps --retries 1 --timeout 30 $(TORCH_INDEX:%=--extra-index-url %) torch
	$(PIP) install --quiet -c constraints.txt --no-build-isolation --editable ".[test]"
	@touch $(STAMP)

demo: $(STAMP) ## make a video with the built-in models, lever by lever, and measure what each gains on this machine
	@mkdir -p demo_out
	$(BIN)/vidaccel demo "$(PROMPT)" --out demo_out/report.html

compare: $(STAMP) ## make a video from a prompt, dense and with sparse attention side by side
	@mkdir -p demo_out
	$(BIN)/vidaccel generate "$(PROMPT)" --model demo --compare --density 0.2 --out demo_out/compare.mp4 \
	--report demo_out/compare.html $(METHODS:%=--method %)

$(DOCS_STAMP): $(STAMP)
	$(PIP) install --quiet -c constraints.txt --no-build-isolation --editable ".[docs]"
	@touch $(DOCS_STAMP)

docs: $(DOCS_STAMP) ## build the documentation site, and fail on what is missing: build/site/index.html
	$(BIN)/python docs/site/stage.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --config-file build/mkdocs.yml
	@echo "The site: build/site/index.html"

dist: $(STAMP) ## build the source distribution, and the wheel from it: dist/
	@rm -rf dist && mkdir -p dist
	$(BIN)/python -c "from setuptools.build_meta import build_sdist; build_sdist('dist')"
	$(PIP) wheel --quiet --no-deps --no-build-isolation --wheel-dir dist dist/*.tar.gz

test: $(STAMP) ## run the tests, but those that are marked as slow
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-all: $(STAMP) ## run all tests: also the notebooks, the benchmark scripts at their smallest, and each kernel for each GPU
	$(PYTEST) $(PYTEST_ARGS)

test-comfyui: $(STAMP) ## run the tests of the nodes in a real ComfyUI: make test-comfyui COMFYUI_PATH=/path/to/ComfyUI
	@test -f "$(COMFYUI_PATH)/main.py" || { echo "Give the folder of a ComfyUI 0.19 or newer, and the Python it runs \
	with: make test-comfyui COMFYUI_PATH=/path/to/ComfyUI COMFYUI_PYTHON=/path/to/python" >&2; exit 1; }
	COMFYUI_PATH="$(COMFYUI_PATH)" COMFYUI_PYTHON="$(COMFYUI_PYTHON)" $(BIN)/python -m pytest tests/nodes
	@# Once more those that run ComfyUI's own models in their process, which is its Python then.
	@$(COMFYUI_PYTHON) -c "import pytest" || { echo "$(COMFYUI_PYTHON) -m pip install pytest" >&2; exit 1; }
	@mkdir -p build/path && ln -sfn "$(CURDIR)" build/path/vidaccel
	COMFYUI_PATH="$(COMFYUI_PATH)" PYTHONPATH="$(CURDIR)/build/path" $(COMFYUI_PYTHON) -m pytest -p no:cacheprovider \
	$$(grep -lE "^from (native_comfyui|comfy_models) " tests/nodes/test_*.py)

lint: $(STAMP) ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@mkdir -p .mypy_cache/path && ln -sfn "$(CURDIR)" .mypy_cache/path/vidaccel
	$(BIN)/mypy

format: $(STAMP) ## repair style and formatting where that is safe
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## run the benchmarks; the tables go to benchmarks/results/
	@set -e; for name in $(BENCHMARKS); do echo "== benchmarks/$$name.py"; env -u OMP_WAIT_POLICY $(BIN)/python benchmarks/$$name.py; done

bench-gpu: $(STAMP) ## run the benchmarks that need a CUDA device
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/step.py --model wan-1.3b
	$(BIN)/python benchmarks/dc_videogen.py --model wan-1.3b
	$(BIN)/python benchmarks/dc_videogen.py --model wan-14b

clean: ## delete .venv and what the demo and builds left
	rm -rf $(VENV) demo_out build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
