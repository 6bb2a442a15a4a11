# Needs python3.11 (or a newer python3) with venv, and GNU make. `make` alone says what there is.
PROFILE ?= cpu
BASE    ?= tiny-dit tiny-sd21 tiny-sdxl
JOBS    ?= 2
# More options for JupyterLab. (In a container everybody is root, which it refuses unless told.)
LAB     ?=
PYTHON  ?= $(firstword $(foreach name,python3.11 python3,$(if $(shell $(name) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && echo yes),$(name))))

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/installed

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup reproduce test lint unit notebook-tests lab bench notebooks lock clean

help:
	@echo 'make setup                                    the environment, in $(VENV)'
	@echo 'make lab                                      JupyterLab on notebooks/00_start_here.ipynb'
	@echo 'make reproduce                                every notebook, everything retrained, on 2 CPU cores'
	@echo 'make reproduce BASE=tiny-dit                  one of the small base models: tiny-dit, tiny-sd21, tiny-sdxl'
	@echo 'make reproduce PROFILE=paper BASE=dit-xl-2-256    the same at the size of the paper, on a 24 GB GPU'
	@echo 'make test                                     everything that CI runs'
	@echo 'make bench                                    seconds per image, AGD against CFG; kept in runs/speed.json'
	@echo 'make notebooks                                the committed notebooks again, outputs renewed'
	@echo 'make lock                                     requirements.lock again, from the versions in pyproject.toml (needs uv)'
	@echo 'make clean                                    remove caches and runs/default, runs/smoke (never runs/cpu or runs/paper)'

setup: $(STAMP)

# Touched only when the whole installation has succeeded: an interrupted one starts again, a whole one costs nothing.
$(STAMP): pyproject.toml requirements.lock
	@echo 'Setting up $(VENV), once: a few minutes, some GB from PyPI, 7 GiB of disk.'
	@test -x $(BIN)/python || test -n '$(PYTHON)' || { \
		echo 'Needs Python 3.11, 3.12 or 3.13 and found none. Install python3.11 with venv' >&2; \
		echo '(Debian, Ubuntu: apt install python3.11-venv), or use conda: see README.md, Installation without make.' >&2; exit 1; }
	@rm -f $(STAMP)
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || { \
		echo 'This Python has no venv. Debian, Ubuntu: apt install python3.11-venv; or use conda: see README.md.' >&2; \
		rm -rf $(VENV); exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $(STAMP)

reproduce: setup
	$(BIN)/python -m agd_lib.reproduce --profile $(PROFILE) --base $(BASE)

test: lint unit notebook-tests

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# JOBS processes with one thread each: small models leave a second thread of their own idle. What takes longest begins first,
# so that all of them end at about the same time.
LONGEST_FIRST := $(foreach number,07 05 04 03 08 06,$(wildcard notebooks/$(number)_*.ipynb))
PARALLEL      := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

unit: setup
	$(PARALLEL) tests/notebooks tests

# Every committed notebook runs with its own defaults in an empty runs folder, and what must not change is compared with
# what is stored in it.
notebook-tests: setup
	runs=$$(mktemp -d) && trap 'rm -rf "$$runs"' EXIT && AGD_LIB_RUNS="$$runs" $(PARALLEL) $(LONGEST_FIRST) notebooks --nbval-lax --nbval-current-env --nbval-cell-timeout=600 \
		--nbval-sanitize-with tests/notebooks/sanitize.cfg -p no:cacheprovider

lab: setup
	$(BIN)/jupyter lab notebooks/00_start_here.ipynb $(if $(filter 0,$(shell id -u)),--allow-root) $(LAB)

bench: setup
	@mkdir -p runs
	$(BIN)/python -m pytest tests/benchmarks --benchmark-only --benchmark-json runs/speed.json

notebooks: setup
	$(BIN)/python -m agd_lib.reproduce --in-place
	$(BIN)/ruff format notebooks

# Every package that is installed, with the hashes of its files: what pip fetches must be what was tested.
lock:
	uv pip compile pyproject.toml --extra dev --generate-hashes --universal --python-version 3.11 --custom-compile-command 'make lock' -o requirements.lock -q

clean:
	rm -rf runs/default runs/smoke runs/in-place .pytest_cache .mypy_cache .ruff_cache .benchmarks .hypothesis build
	find . -path ./$(VENV) -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -exec rm -rf {} +
