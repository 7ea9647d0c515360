# Every target does its own set-up: python3 (3.11 or later) and make are enough.
#
#   make demo      the main job: convert, train, generate and measure the small model
#   make test      the test suite on a CPU
#   make check     lint, formatting and tests: what has to pass before a commit
#   make format    let ruff rewrite what it can
#   make nano-code copy the code files beside the weights of arcLM-nano, after a change to one of them
#   make gpu       GPU tests and benchmarks, or one sentence where there is no GPU
#
# PYTEST_ARGS goes to pytest: make test PYTEST_ARGS="-k mask -x"; in two processes unless it says -n
# VENV= takes $(PYTHON) as it is and installs nothing: make gpu VENV= PYTHON=python3
# make gpu runs GPU_SCRIPTS one after the other and writes to OUT; DLLM is a checkout of dLLM to compare with:
#   make gpu GPU_SCRIPTS="gpu_tests generate_speed" OUT=outputs DLLM=../dllm

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
GPU_SCRIPTS ?= gpu_tests denoising_step generate_speed train_speed train_memory optimizers scaling
OUT ?= benchmarks/results
DLLM ?=

ifeq ($(VENV),)
READY := .link/arclm
READY_FOR_GPU := $(READY)
RUN := PYTHONPATH="$(CURDIR)/.link:$$PYTHONPATH" $(PYTHON)
else
READY := $(VENV)/.ready
READY_FOR_GPU := $(VENV)/.ready-for-gpu
RUN := $(VENV)/bin/python
endif
INSTALL := $(VENV)/bin/python -m pip install -q --disable-pip-version-check --no-compile -c constraints.txt -e

.PHONY: demo test check lint format nano-code gpu gpu_tests denoising_step generate_speed train_speed train_memory optimizers scaling
.NOTPARALLEL: # what is measured is measured alone
.DEFAULT_GOAL := test

demo: $(READY)
	$(RUN) demo.py

test: export HF_HUB_OFFLINE = 1
test: $(READY)
	$(RUN) -m pytest -q -n 2 --dist worksteal $(PYTEST_ARGS)

check: lint test

lint: $(READY)
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check

format: $(READY)
	$(RUN) -m ruff check --fix
	$(RUN) -m ruff format

nano-code: $(READY)
	$(RUN) -c 'import shutil; from transformers.dynamic_module_utils import get_relative_import_files as files; \
	    [shutil.copy(file, "nano/arclm-nano") for file in {"modeling_arclm.py", *files("modeling_arclm.py")}]'

# Exit status 3 is "torch works and sees no GPU"; a torch that cannot be imported is an error, not a missing GPU.
# -k: a script that fails keeps none of the others from running, and the exit status tells.
gpu: $(READY)
	@if $(RUN) -c 'import torch; raise SystemExit(0 if torch.cuda.is_available() else 3)'; then \
	    $(MAKE) --no-print-directory -k $(GPU_SCRIPTS); \
	elif [ $$? -eq 3 ]; then \
	    echo "make gpu: torch finds no CUDA device on this machine, so the GPU tests and benchmarks were not run."; \
	else exit 1; fi

# these files alone: others ask for packages that a GPU test does not need
gpu_tests: $(READY_FOR_GPU)
	$(RUN) -m pytest -q -m gpu tests/test_*gpu.py $(PYTEST_ARGS)

generate_speed train_speed: OPTIONS = $(if $(DLLM),--dllm "$(DLLM)")
denoising_step generate_speed train_speed train_memory optimizers scaling: $(READY_FOR_GPU)
	@why=$$($(RUN) benchmarks/$@.py --help 2>&1) || { echo "$@ cannot start: $$(echo "$$why" | tail -n 1)"; exit 1; }
	@mkdir -p "$(OUT)"
	$(RUN) benchmarks/$@.py --output_file "$(OUT)/$@_gpu.json" $(OPTIONS)

# Made last, so a half-built environment never counts as ready and is built again from nothing. The import at the end shows
# that the environment works and compiles the modules in use; letting pip compile every installed file takes far longer.
$(VENV)/.ready: pyproject.toml constraints.txt
	test -e $@ || $(PYTHON) -m venv --clear $(VENV)
	$(INSTALL) ".[dev]"
	env -u PYTHONDONTWRITEBYTECODE $(VENV)/bin/python -c 'import datasets, transformers; \
	    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3_5ForCausalLM, Trainer'
	touch $@

$(VENV)/.ready-for-gpu: $(VENV)/.ready
	$(INSTALL) ".[gpu]"
	touch $@

# `import arclm` without an installation: a link with that name to this folder.
.link/arclm:
	mkdir -p .link
	ln -sfn .. $@
