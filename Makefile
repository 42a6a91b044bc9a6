# make quickstart: from nothing to a leaderboard. make test: the tests. Both need Python 3.11 or 3.12 and make.
PYTHON ?= python3.11
VENV ?= .venv
STAMP := $(VENV)/.installed

# Tensors in huge pages, which makes training on the CPU of a virtual machine faster.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: install quickstart test lint clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

quickstart: $(STAMP)
	$(VENV)/bin/tmd-eval quickstart --out quickstart

test: lint
	$(VENV)/bin/python -m pytest -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV)
