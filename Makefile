# The commands of a checkout. `make run` and `make test` do all the set-up themselves, once.
#
#   make run       install, export the small model, build it for this machine, paint picture.png
#   make test      the whole test suite
#   make check     formatting, lint, types and layering, exactly as CI runs them
#   make format    let ruff rewrite what it can
#   make test-gpu  the tests that need an NVIDIA GPU, in an environment of their own, .venv-gpu
#   make bench-gpu benchmarks on the GPU, to benchmarks/results; -steps, -batch, -compile and -cold are its parts
#   make tiny      the small model that test-gpu needs besides, to build/tiny, where torch is but no GPU
#   make clean     remove everything that the commands above made, but for the picture
#
# PYTHON       the Python that makes the environment, 3.11 or newer.
# TORCH_INDEX  where pip finds torch. The default index may offer only builds with CUDA, gigabytes that nothing
#              here needs: name an index of CPU builds then (pytorch.org lists them under "Get started").

# WORKERS      how many processes run the tests, of one thread each, which take up to 2 GB.
# MODEL        the bundle of bench-gpu, and CHECKPOINT_OF_MODEL its diffusers folder, which diffusers paints with;
#              for shapes it is found.
# BACKENDS     that bench-gpu measures.
# GPU_PYTHON   for test-gpu and bench-gpu, a Python that has all that they need; nothing is installed then.
# GPU_EXTRAS   the extras to install for them otherwise: ort-gpu,tensorrt for TensorRT too.
# WHEELS       to install them without a network: a folder with all wheels, setuptools too.
# TINY         for test-gpu: the folder that make tiny made, if torch and diffusers are not there to export it.

PYTHON ?= python3
TORCH_INDEX ?=
GPU_PYTHON ?=
GPU_EXTRAS ?= ort-gpu
WHEELS ?=
TINY ?=
WORKERS ?= 3
MODEL ?= shapes
CHECKPOINT_OF_MODEL ?=
BACKENDS ?= tensorrt,tensorrt-rtx,ort-cuda
PROMPT ?= a red circle above a blue square on a white background

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
LAYERS := bundle export engine runtime serve cli benchmarks models
TYPES := build/types
CHECKPOINT := models/shapes/checkpoint

.DEFAULT_GOAL := help
.PHONY: help run test check format clean test-gpu tiny bench-gpu bench-gpu-steps bench-gpu-batch bench-gpu-compile bench-gpu-cold

help:
	@sed -n '3,10s/^# *//p' Makefile

run: $(VENV)/.run build/shapes/bundle.json
	$(BIN)/allaprima build build/shapes
	$(BIN)/allaprima generate build/shapes "$(PROMPT)" --seed 7 -o picture.png

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

check: $(VENV)/.dev $(TYPES)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	MYPYPATH=$(TYPES) $(BIN)/mypy -p allaprima
	$(BIN)/python -m pytest -q tests/test_layering.py

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Either an environment of its own, since onnxruntime and onnxruntime-gpu exclude each other, which sees the packages
# of the system's Python, as torch and diffusers; or GPU_PYTHON, from which the checkout is only put on the path.
GPU := $(VENV)-gpu
ifeq ($(GPU_PYTHON),)
GPU_READY := $(GPU)/.ready
RUN_GPU := $(GPU)/bin/python
else
GPU_READY := $(TYPES)
RUN_GPU := PYTHONPATH=$(CURDIR)/$(TYPES)$(if $(PYTHONPATH),:$(PYTHONPATH)) $(GPU_PYTHON)
endif
FROM_WHEELS := $(if $(WHEELS),--no-index --find-links $(WHEELS))

test-gpu: $(GPU_READY)
	$(if $(TINY),ALLAPRIMA_TINY=$(abspath $(TINY))) $(RUN_GPU) -m pytest -m gpu tests/gpu $(ARGS)

tiny: $(VENV)/.dev
	$(BIN)/python -c 'from pathlib import Path; from tests.export.conftest import write_tiny; write_tiny(Path("build/tiny-checkpoint"))'
	$(BIN)/allaprima export build/tiny-checkpoint build/tiny --name tiny --force

# Contestants take turns within a group, so all that are to be compared are in it.
BENCH_GPU = $(RUN_GPU) -m allaprima.cli bench $(MODEL) --backend $(BACKENDS) --precision fp16 \
	$(if $(CHECKPOINT_OF_MODEL),--checkpoint $(CHECKPOINT_OF_MODEL)) \
	--output benchmarks/results/gpu-$(notdir $(MODEL))-$(@:bench-gpu-%=%)

bench-gpu: bench-gpu-steps bench-gpu-batch bench-gpu-compile bench-gpu-cold

bench-gpu-steps: $(GPU_READY)
	$(BENCH_GPU) --vs diffusers --steps 1,4,8,20,30,50 --cold 0 $(ARGS)

bench-gpu-batch: $(GPU_READY)
	$(BENCH_GPU) --vs diffusers --steps 4,20 --batch 4,8 --cold 0 --no-roofline $(ARGS)

bench-gpu-compile: $(GPU_READY)
	$(BENCH_GPU) --vs diffusers-compile --steps 4,20,50 --rounds 2 --cold 0 --no-roofline $(ARGS)

bench-gpu-cold: $(GPU_READY)
	$(BENCH_GPU) --vs diffusers --steps 4 --rounds 1 --repeats 1 --cold 3 --no-roofline $(ARGS)

$(GPU)/.ready: pyproject.toml
	$(PYTHON) -m venv --system-site-packages $(GPU)
	$(GPU)/bin/python -m pip install --quiet $(FROM_WHEELS) 'setuptools>=77' pytest matplotlib onnx scipy scikit-image
	$(GPU)/bin/python -m pip install --quiet $(FROM_WHEELS) --no-build-isolation --editable '.[$(GPU_EXTRAS)]'
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-gpu build allaprima.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

build/shapes/bundle.json: $(VENV)/.run $(shell find $(CHECKPOINT) -type f 2>/dev/null)
	$(BIN)/allaprima export $(CHECKPOINT) build/shapes --name shapes --force

# torch comes first and by itself, so that nothing else can pull another build of it.
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@touch $@

$(VENV)/.run: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[export,openvino,ort]'
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	$(PIP) --editable '.[export,openvino,ort,tensorrt-rtx,serve,bench,dev]'
	@touch $@

# mypy does not see an editable install; it sees the namespace as a folder of links to the layers.
$(TYPES): Makefile
	mkdir -p $@/allaprima
	for layer in $(LAYERS); do ln -sfn ../../../$$layer $@/allaprima/$$layer; done
	@touch $@
