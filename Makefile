# Every target depends on `setup`, so each one works in a fresh clone.
# `make setup PYTHON=/path/to/python3.12` selects the interpreter; `make setup UV=` does not use uv.
VENV := .venv
OLDEST_JAX := 0.11.2
WORKERS := 2

bin := $(VENV)/bin
oldest := .venv-jax-$(OLDEST_JAX)

# Modules of other projects must not shadow the pinned ones.
unexport PYTHONPATH PYTHONHOME

# The workers share the cores, so each uses one compute thread. jax 0.12 reads PJRT_NPROC, older versions read NPROC.
one_thread := PJRT_NPROC=1 NPROC=1 OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
pytest := $(one_thread) $(bin)/python -m pytest -n $(WORKERS) --dist loadgroup

.DEFAULT_GOAL := help
.PHONY: help setup lint tpu-compiler test test-full test-faults test-jax-oldest demo docs doc-examples format constraints clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' Makefile

setup: ## create .venv with the project and its development tools from the pins, unless it is up to date
	@scripts/setup $(VENV) constraints.txt

lint: setup ## run ruff, import-linter and pyright
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/lint-imports
	$(bin)/pyright --pythonpath $(bin)/python

tpu-compiler: setup ## install libtpu beside .venv, so that tests can compile kernels without a TPU
	@scripts/tpu-compiler $(VENV) constraints.txt

test: lint tpu-compiler ## run lint and the tests (the gate)
	$(pytest) -m "not full"

test-full: lint tpu-compiler ## run lint, the tests and the wide parameter sweeps
	$(pytest)

test-faults: setup ## inject every fault of docs/reliability.md, and write a table of those tried and survived
	$(pytest) -m fault --fault-table build/faults.md

test-jax-oldest: ## run the tests on the oldest supported jax
	@scripts/setup $(oldest) constraints-jax-$(OLDEST_JAX).txt
	$(subst $(bin)/,$(oldest)/bin/,$(pytest)) -m "not full"

demo: setup ## train two small models, evaluate them, and write a report
	rm -rf runs/demo
	$(bin)/recallax train demo_based --run runs/demo/based
	$(bin)/recallax train demo_window --run runs/demo/window
	$(bin)/recallax report runs/demo/based runs/demo/window --out runs/demo/report.html

docs: setup ## build the documentation into build/site
	$(bin)/mkdocs build

doc-examples: setup ## run the examples of docs/ and update their output
	$(bin)/python scripts/doc-examples

format: setup ## format the code and apply ruff's fixes
	$(bin)/ruff format .
	$(bin)/ruff check --fix .

constraints: ## resolve the dependencies again and rewrite the pins
	scripts/pin constraints.txt
	scripts/pin constraints-jax-$(OLDEST_JAX).txt jax==$(OLDEST_JAX)

clean: ## delete environments, caches and build outputs; keep runs/
	rm -rf $(VENV) .venv-jax-* build dist *.egg-info .hypothesis .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
