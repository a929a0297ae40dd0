# Needs Python 3.11 or newer, pip and make; everything else is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PROTOS := $(wildcard protos/*.proto)
PROTOC_OUT = --python_out=$(1) --pyi_out=$(1) --grpc_python_out=$(1)

.PHONY: help demo test check check-format lint types check-stubs stubs format compose-test chaos sanitize install clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo          serve the demo checkpoint with 16 workers and stream an answer'
	@echo 'make test          the whole test suite'
	@echo 'make check         what CI runs: format, lint, types, stubs fresh, tests'
	@echo 'make format        format the code and fix what lint can fix'
	@echo 'make stubs         generate the Python stubs of protos/'
	@echo 'make compose-test  start the docker-compose cluster, use it, break it, take it down'
	@echo 'make chaos         an hour of failures under load (MINUTES=60 SEED=at random)'
	@echo 'make sanitize      the compiled code under AddressSanitizer and UBSan (MINUTES=6: of chaos, too)'
	@echo 'make clean         remove the virtual environment and every cache'

# --without-pip and --python: a Debian Python without ensurepip will do.
$(READY): pyproject.toml constraints.txt setup.py $(wildcard mesh/native/*.[ch])
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Expert Mesh needs Python 3.11 or newer; say which with PYTHON=...")'
	@echo "installing into $(VENV), which takes a few minutes once"
	$(PYTHON) -m venv --without-pip $(VENV)
	$(PYTHON) -m pip --python $(BIN)/python install -qq --disable-pip-version-check -c constraints.txt pip -e '.[dev]'
	@touch $@

install: $(READY)

demo: $(READY)
	$(BIN)/python -m cli.demo

test: $(READY)
	$(BIN)/python -m pytest

check: check-format lint types check-stubs test

check-format: $(READY)
	$(BIN)/ruff format --check .

lint: $(READY)
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy

check-stubs: $(READY)
	@fresh=$$(mktemp -d) && trap 'rm -rf "$$fresh"' EXIT && \
	$(BIN)/python -m grpc_tools.protoc -I. $(call PROTOC_OUT,"$$fresh") $(PROTOS) && \
	for stub in "$$fresh"/protos/*; do \
	  cmp -s "$$stub" protos/$$(basename "$$stub") || \
	    { echo "protos/$$(basename "$$stub") is stale: run 'make stubs'" >&2; exit 1; }; \
	done && echo 'stubs are fresh'

stubs: $(READY)
	$(BIN)/python -m grpc_tools.protoc -I. $(call PROTOC_OUT,.) $(PROTOS)

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

compose-test: $(READY)
	$(BIN)/python compose/test.py

chaos: $(READY)
	$(BIN)/python -m tests.chaos --minutes $(or $(MINUTES),60) $(if $(SEED),--seed $(SEED))

sanitize: $(READY)
	bash tools/sanitize.sh

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
