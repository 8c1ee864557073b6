# Everything runs from a fresh clone with Python 3.10 or newer and make: the first target builds the environment.

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
PIP := $(VENV)/bin/python -m pip
TORCH := torch==2.13.0

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help install demo docs test test-all browser test-oldest mutants bench papers clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: $(STAMP) ## create the environment in .venv (the other targets do so too)

demo: $(STAMP) ## train a small network by energy-based learning; its pictures and a page go to demo_output
	$(VENV)/bin/python -m torch2ebm demo

docs: $(STAMP) ## build the site in the folder site; a broken link or an unknown name stops it
	$(PIP) install -q -c constraints.txt -e '.[docs]'
	OMP_NUM_THREADS=1 $(VENV)/bin/python website/tutorials.py
	$(VENV)/bin/python -m mkdocs build --strict

test: PYTEST_ARGS :=
test-all: PYTEST_ARGS := -m ""
test: ## lint, check the types, run the tests
test-all: ## the same with the slow tests
test-all: browser
test test-all: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(PYTEST) --cov --cov-report=term --cov-fail-under=95 $(PYTEST_ARGS) $(addprefix --ignore=,$(UNTRACED))
	$(PYTEST) $(PYTEST_ARGS) $(UNTRACED)

# For the slow tests of pages: the site is built without the outputs of tutorials where `make docs` has not run, and
# opened in the Chromium of the system (apt-get install chromium), or Playwright's own.
browser: $(STAMP)
	$(PIP) install -q -c constraints.txt -e '.[browser,docs]'

# Branch coverage makes tests half as slow again. These run the same lines for many modules, many times, or in other
# processes: they go without, and what the others reach is at the gate. The longest come first, so that none is last.
UNTRACED := $(patsubst %,tests/%.py,test_tutorials programs/test_programs programs/test_models_by_programs \
	properties/test_steady properties/test_all_algorithms capture/test_kinds_of_forward properties/test_families \
	properties/test_random_modules algorithms/test_algorithms graph/test_graph test_wheel \
	properties/test_faults properties/test_own_extensions implicit/test_parameter_steps programs/test_program_settings \
	model/test_join clamping/test_infer_on_architectures inference/test_on_step potentials/test_relaxations \
	model/test_module_view properties/test_bad_input solvers/test_solvers algorithms/test_implicit_sgd \
	model/test_kept_tensors model/test_unchanged test_guides test_sdist)
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist worksteal -q

OLDEST := .venv-oldest
test-oldest: ## the tests with the oldest torch, in an environment of its own (several GB: its wheel brings CUDA)
	$(PYTHON) -m venv $(OLDEST)
	grep -v -e '^torch==' -e '^sympy==' constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install -q -c $(OLDEST)/constraints.txt torch==2.6.0 -e '.[test]'
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n 2 -q

mutants: $(STAMP) ## put one-line defects into the mathematics: the tests must notice every one
	$(VENV)/bin/python tests/mutants.py --jobs 2

bench: $(STAMP) ## measure speed, memory and growth against backpropagation (and on a GPU where there is one)
	$(VENV)/bin/python benchmarks/speed.py
	$(VENV)/bin/python benchmarks/speed.py --device cuda
	$(VENV)/bin/python benchmarks/overhead.py
	$(VENV)/bin/python benchmarks/memory.py
	$(VENV)/bin/python benchmarks/growth.py
	$(VENV)/bin/python benchmarks/solvers.py

papers: DATA := ../shared/mnist_10k.npz
papers: $(STAMP) ## run the experiments of the papers on MNIST (DATA=folder of its IDX files, or an npz)
	$(VENV)/bin/python benchmarks/papers.py a --data $(DATA)
	$(VENV)/bin/python benchmarks/papers.py c --data $(DATA)
	$(VENV)/bin/python benchmarks/papers.py d --mnist --data $(DATA)

clean: ## remove what builds and tools leave behind; the environment stays
	rm -rf build dist site demo_output tutorial_output htmlcov .coverage .coverage.* *.egg-info
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path "./.venv*/*" -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# torch first, and alone, so that nothing else chooses its version.
$(STAMP): setup.cfg constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("torch2ebm needs Python 3.10 or newer: make PYTHON=...")'
	@$(PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt $(TORCH)
	$(PIP) install -q -c constraints.txt -e '.[test,tutorials,plot]'
	@touch $@
