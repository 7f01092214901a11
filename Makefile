# `make demo` and `make test` set themselves up: Python >= 3.10, pip, a C++ compiler, make.
PYTHON ?= python3
VENV := .venv
# Modules are compiled when they are first imported: most of torch's never are.
export PIP_NO_COMPILE := 1
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
DEVELOPMENT := $(VENV)/installed-dev
DOCUMENTATION := $(VENV)/installed-docs
SHELL := /bin/bash

.PHONY: demo test test-nightly test-cluster test-package lint docs clean
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	source $(BIN)/activate && python launch/demo.py

# Two workers of one thread each; `python -m pytest tests/...` is one. See tests/README.md.
PYTEST := OMP_NUM_THREADS=1 python -m pytest
SPREAD := -n 2 --dist worksteal

test: $(DEVELOPMENT)
	source $(BIN)/activate && $(PYTEST) $(SPREAD) tests

# Full products of what `make test` covers in pairs.
test-nightly: $(DEVELOPMENT)
	source $(BIN)/activate && $(PYTEST) $(SPREAD) -m nightly tests

# Several hosts on this machine, in namespaces: Linux, root, ip, tc, sshd, pdsh; else it says why not.
test-cluster: $(DEVELOPMENT)
	source $(BIN)/activate && DALLE1_CLUSTER=1 $(PYTEST) tests/cluster

# The wheel and the source distribution, built, installed elsewhere and used there.
test-package: $(DEVELOPMENT)
	source $(BIN)/activate && DALLE1_PACKAGE=1 $(PYTEST) tests/package

lint: $(DEVELOPMENT)
	source $(BIN)/activate && ruff check . && ruff format --check . && mypy

# The documentation's site, in build/docs/index.html: any warning is an error. Then the pages are checked.
docs: $(DOCUMENTATION)
	rm -rf build/docs build/doctrees
	source $(BIN)/activate && python -m sphinx --fail-on-warning --keep-going --quiet -d build/doctrees docs build/docs
	source $(BIN)/activate && DALLE1_SITE=build/docs $(PYTEST) tests/docs/test_site.py

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[curves,eval]'
	touch $@

$(DEVELOPMENT): $(INSTALLED)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[curves,eval,filter,hub,mini,parquet,serve,web,dev]'
	touch $@

$(DOCUMENTATION): $(DEVELOPMENT)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) build dist runs data
