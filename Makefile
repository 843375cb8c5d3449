# Everything works on a fresh machine with Python 3.11 or 3.12 and a package index: each target sets up .venv first.

PRESET  ?= quickstart
STORAGE ?= $(CURDIR)/storage
ARGS    ?=
WORKERS ?= 2
PYTHON  ?=

.DEFAULT_GOAL := help
.PHONY: help run stop ui test check clean setup

# Bytecode has to be written: Ray starts many processes, and without it each would compile what it imports.
unexport PYTHONDONTWRITEBYTECODE PYTHONHOME PYTHONPATH

# Threads that sleep rather than spin while they wait: the tests share two cores with Ray's own processes.
export OMP_WAIT_POLICY ?= PASSIVE

# The first Python that really runs, is new enough and can make environments; `bootstrap.py` does the rest.
CANDIDATES = $(or $(PYTHON),python3.11 python3.12 python3)
USABLE = import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))

help: ## show this list
	@echo "make TARGET [PRESET=$(PRESET)] [STORAGE=DIR] [ARGS='--train.steps 50 ...'] [PYTHON=python3.12] [WORKERS=$(WORKERS)]"
	@sed -n 's/^\([a-z]*\):.*## /  \1\t/p' $(MAKEFILE_LIST) | expand -t 12

run: setup ## run the pipeline: prepare, pretrain, convert, evaluate, deploy; the endpoint stays up
	@.venv/bin/python -m jobs.local run "$(PRESET)" --storage "$(STORAGE)" $(ARGS)

stop: ## end what `make run` started in this storage, and nothing else
	@test ! -x .venv/bin/python || .venv/bin/python -m jobs.local stop --storage "$(STORAGE)"

ui: setup ## open the MLflow server of this storage on loopback, until Ctrl-C
	@.venv/bin/python -m jobs.local ui --storage "$(STORAGE)"

test: setup ## run the tests, in WORKERS processes
	@.venv/bin/python -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder $(ARGS)

check: setup ## ruff (lint and format) and mypy
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy

setup: ## build .venv, unless it is there and the pins are unchanged
	@for python in $(CANDIDATES); do \
		if "$$python" -c '$(USABLE)' 2>/dev/null; then \
			KRAKEN_PYTHON_GIVEN="$(PYTHON)" exec "$$python" bootstrap.py; \
		fi; \
	done; \
	echo "error: none of '$(CANDIDATES)' is a Python 3.11 or 3.12 with the venv module;" \
		"install one, or give it: make PYTHON=/path/to/python3.12" >&2; exit 2

clean: stop ## remove .venv and the caches; the storage stays
	@rm -rf .venv .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
