# Two commands for a newcomer: make demo, make test. Both build .venv first; a second call finds it built.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO ?= runs/demo
# Test files beside one another; each takes one core and up to 2 GB.
JOBS ?= 2
PYTEST = $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile
CACHE ?= runs/cache

.DEFAULT_GOAL := help
.PHONY: help install demo test lint stress clean

help:
	@echo 'make demo     a whole study on phantoms; prints where its report lies'
	@echo 'make test     ruff, mypy and the test suite'
	@echo 'make lint     ruff and mypy alone'
	@echo 'make stress   the slow tests: kills, full disks, large data'
	@echo 'make install  build $(VENV) and install fluoroscope in it, as the others do by themselves'
	@echo 'make clean    delete $(VENV), $(DEMO) and $(CACHE)'

install: $(STAMP)

$(STAMP): setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo 'fluoroscope needs Python 3.11 or newer; name one with: make PYTHON=python3.12'; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) \
		|| { rm -rf $(VENV); echo 'no venv module; on Debian: apt-get install python3-venv'; exit 1; }
	@echo 'installing into $(VENV): some minutes and 6 GB, most of it torch'
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/fluoro study configs/demo.yaml --cache $(CACHE) --out $(DEMO) --overwrite
	@echo 'open $(CURDIR)/$(DEMO)/report.html'

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	$(PYTEST) -m 'not slow'

stress: $(STAMP)
	$(PYTEST) -m slow

clean:
	rm -rf $(VENV) $(DEMO) $(CACHE) build .pytest_cache .mypy_cache .ruff_cache *.egg-info
