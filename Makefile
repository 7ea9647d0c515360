# Every target does its own set-up: python3 (3.10 or later) and make are enough.
#
#   make demo      the main job: convert, train, generate and measure the small model
#   make test      the test suite on a CPU
#   make check     lint, formatting and tests: what has to pass before a commit
#   make format    let ruff rewrite what it can
#   make nano-code copy the code files beside the weights of arcLM-nano, after a change to one of them
#   make gpu       GPU tests and benchmarks, or one sentence where there is no GPU
#
# PYTEST_ARGS goes to pytest: make test PYTEST_ARGS="-k mask -x"
# VENV= takes $(PYTHON) as it is and installs nothing: make gpu VENV= PYTHON=python3

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=

ifeq ($(VENV),)
READY := .link/arclm
RUN := PYTHONPATH="$(CURDIR)/.link:$$PYTHONPATH" $(PYTHON)
else
READY := $(VENV)/.ready
RUN := $(VENV)/bin/python
endif

.PHONY: demo test check lint format nano-code gpu
.DEFAULT_GOAL := test

demo: $(READY)
	$(RUN) demo.py

test: export HF_HUB_OFFLINE = 1
test: $(READY)
	$(RUN) -m pytest -q $(PYTEST_ARGS)

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

# exit status 3 is "torch works and sees no GPU"; a torch that cannot be imported is an error, not a missing GPU
gpu: $(READY)
	@if $(RUN) -c 'import torch; raise SystemExit(0 if torch.cuda.is_available() else 3)'; then \
	    set -e; \
	    $(RUN) -m pytest -q -m gpu $(PYTEST_ARGS); \
	    for script in generate_speed train_speed train_memory optimizers scaling; do \
	        echo "== $$script"; $(RUN) benchmarks/$$script.py; \
	    done; \
	elif [ $$? -eq 3 ]; then \
	    echo "make gpu: torch finds no CUDA device on this machine, so the GPU tests and benchmarks were not run."; \
	else exit 1; fi

# Made last, so a half-built environment never counts as ready and is built again from nothing. The import at the end shows
# that the environment works and compiles the modules in use; letting pip compile every installed file takes far longer.
$(VENV)/.ready: pyproject.toml constraints.txt
	test -e $@ || $(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check --no-compile -c constraints.txt -e ".[dev]"
	env -u PYTHONDONTWRITEBYTECODE $(VENV)/bin/python -c 'import datasets, transformers; \
	    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3_5ForCausalLM, Trainer'
	touch $@

# `import arclm` without an installation: a link with that name to this folder.
.link/arclm:
	mkdir -p .link
	ln -sfn .. $@
