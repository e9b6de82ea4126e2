# Everything a person types. Each target makes the environment first, which does nothing when it is up to date.
.PHONY: help setup demo test test-gpu parity lint clean

python := .venv/bin/python

help:
	@echo "make demo      train a small hybrid Linear-MoE on real text, continue a prompt, draw the loss"
	@echo "make test      the whole test suite, on CPU; ARGS='tests/launch -k heads' picks"
	@echo "make test-gpu  the tests that need a CUDA device; GPU_JOBS=8 takes as many processes"
	@echo "make parity    every layout x every mixer against one process (half an hour; make test runs a part)"
	@echo "make lint      ruff, its formatter, mypy"
	@echo "make setup     only the environment, in .venv (PYTHON=<python3.12> chooses the interpreter)"
	@echo "make clean     remove caches and build output; .venv and runs/ stay"

setup:
	@sh scripts/setup.sh

demo: setup
	@PYTHON=$(python) sh scripts/demo.sh

# Two files at a time; most tests wait for processes of their own, so that more would want more cores.
JOBS ?= 2
test: setup
	@$(python) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

# Most of its time kernels compile: GPU_JOBS=8 does that in as many processes.
GPU_JOBS ?= 0
test-gpu: setup
	@$(python) -m pytest -m gpu -n $(GPU_JOBS) $(ARGS)

parity: setup
	@LINEAR_MOE_ALL_LAYOUTS=1 $(python) -m pytest -n $(JOBS) --dist loadfile tests/training/test_layouts.py tests/training/test_family_layouts.py $(ARGS)

lint: setup
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy

clean:
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
