# Every target starts from what scripts/setup makes, so each one works on a fresh clone.
# make setup PYTHON=/path/to/python3.12 picks the interpreter; make setup UV= does without uv.
VENV := .venv
OLDEST_JAX := 0.11.2
WORKERS := 2

bin := $(VENV)/bin
oldest := .venv-jax-$(OLDEST_JAX)

# Another project's modules must not stand in for the pinned ones.
unexport PYTHONPATH PYTHONHOME

# The workers share the cores, so each keeps to one compute thread; more, and they only get in one another's way.
# jax 0.12 reads PJRT_NPROC, older ones NPROC.
one_thread := PJRT_NPROC=1 NPROC=1 OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
pytest := $(one_thread) $(bin)/python -m pytest -n $(WORKERS) --dist loadgroup

.DEFAULT_GOAL := help
.PHONY: help setup lint tpu-compiler test test-full test-jax-oldest demo docs doc-examples format constraints clean

help: ## say what each target does
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' Makefile

setup: ## make .venv with the project and its dev tools, from the pins; nothing to do when up to date
	@scripts/setup $(VENV) constraints.txt

lint: setup ## ruff, the layering of the imports, pyright
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/lint-imports
	$(bin)/pyright --pythonpath $(bin)/python

tpu-compiler: setup ## put libtpu beside .venv, so that the tests can compile kernels for a TPU that is not there
	@scripts/tpu-compiler $(VENV) constraints.txt

test: lint tpu-compiler ## the gate: lint, then the tests
	$(pytest) -m "not full"

test-full: lint tpu-compiler ## the gate, and the wide sweeps with it
	$(pytest)

test-jax-oldest: ## the tests alone, on the oldest jax that is supported
	@scripts/setup $(oldest) constraints-jax-$(OLDEST_JAX).txt
	$(subst $(bin)/,$(oldest)/bin/,$(pytest)) -m "not full"

demo: setup ## train two small models, evaluate them, and write a report
	rm -rf runs/demo
	$(bin)/recallax train demo_based --run runs/demo/based
	$(bin)/recallax train demo_window --run runs/demo/window
	$(bin)/recallax report runs/demo/based runs/demo/window --out runs/demo/report.html

docs: setup ## build the pages of docs/ into build/site
	$(bin)/mkdocs build

doc-examples: setup ## run the examples of docs/ afresh and write down what they print
	$(bin)/python scripts/doc-examples

format: setup ## let ruff format the code and mend what it can
	$(bin)/ruff format .
	$(bin)/ruff check --fix .

constraints: ## resolve the dependencies afresh and rewrite the pins
	scripts/pin constraints.txt
	scripts/pin constraints-jax-$(OLDEST_JAX).txt jax==$(OLDEST_JAX)

clean: ## delete the environments, caches and build leftovers; runs/ stays
	rm -rf $(VENV) .venv-jax-* build dist *.egg-info .hypothesis .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
