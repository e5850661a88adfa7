# make demo    the demo program: eager, torch.compile and the fusion_pass backend on Z-Image (DEMO_ARGS="--size small ...")
# make test    everything that CI checks: lint, types, packaging, CPU tests
# make lint    ruff and mypy only
# make docs    the documentation as a site in out/docs, its tables made anew from the results
# make bench   on a GPU: the kernels, then the whole model; json and plots in out/bench
# Each sets up what it needs in $(VENV). Another Python (3.10 or newer): make PYTHON=python3.12 ...
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
DEMO_ARGS ?=
TEST_ARGS ?=
STAMP = $(VENV)/.installed

BENCH = out/bench

.PHONY: help demo test lint docs bench preflight clean
help:
	@sed -n 's/^# //p' Makefile | head -6

demo: $(STAMP) | preflight
	$(VENV)/bin/python examples/zimage.py $(DEMO_ARGS)

# One thread a worker: JOBS workers with a pool of threads each get in each other's way. Tests of one xdist_group share
# what took long to make, so one worker runs them.
test: lint
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(JOBS) --dist loadgroup $(TEST_ARGS)

lint: $(STAMP) | preflight
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: $(STAMP) | preflight
	$(VENV)/bin/python docs/generate.py
	$(VENV)/bin/python -m sphinx -q -W --keep-going -n docs out/docs
	@echo "open out/docs/index.html"

bench: $(STAMP) | preflight
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	mkdir -p $(BENCH)
	$(VENV)/bin/python kernels/benchmarks/bench_kernels.py --json $(BENCH)/kernels.json
	$(VENV)/bin/python examples/bench_zimage.py --json $(BENCH)/zimage.json
	$(VENV)/bin/python kernels/benchmarks/plot.py --kernels $(BENCH)/kernels.json --model $(BENCH)/zimage.json --to $(BENCH)

preflight:
	@command -v $(PYTHON) >/dev/null || { echo "error: no $(PYTHON) on this machine: Python 3.10 or newer is needed, or make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) .ci/preflight.py

$(STAMP): pyproject.toml constraints.txt | preflight
	@echo "Installing into $(VENV): some minutes the first time, torch is large"
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --progress-bar off -c constraints.txt -e '.[test,examples]'
	@touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
