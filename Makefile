# make setup | run | test | test-slow | test-workflow | lint | wheel: each installs what it needs first, into .venv.
# make gpu-check: with the .venv that is there or, on a machine with a GPU and its own torch, with that python3.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: setup run test test-slow test-workflow test-conda lint wheel gpu-check

setup: .venv/ready

# The stamp is made last: an installation that was interrupted is gone on with, a finished one takes no time.
.venv/ready: requirements.txt requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || { \
	  echo "error: $(PYTHON) is not a Python 3.11; install python3.11 with its venv module," \
	    "or name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "installing into .venv: a few minutes"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt
	@$(BIN)/python -m compileall -qq -j 0 .venv/lib || true  # pip compiles on one core; some packages hold templates
	@touch $@

run: setup
	$(BIN)/snakemake --cores all
	@cat results/summary.txt
	@echo
	@echo "the report with all figures: results/report.html"

# In two processes, each with one thread.
test: setup
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-slow: setup
	$(BIN)/python -m pytest -m slow

# The tiny configuration of .test: every rule of the default one, in a minute or two.
test-workflow: setup
	$(BIN)/snakemake --directory .test --cores 2

# The same with every rule in the conda environment it names: the one target that needs `conda`,
# and runs the snakemake that is on the path, so that it can be that of workflow/envs/workflow.yaml.
test-conda:
	snakemake --directory .test --use-conda --cores 2

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile workflow
	$(BIN)/snakemake --lint

# dist/ gets the sdist and the wheel of the package `stepdown`.
wheel: setup
	$(BIN)/python -m build

gpu-check:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,python3) benchmarks/gpu_check
