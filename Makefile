# Each target sets up .venv first when it is missing or stale. PYTHON picks the interpreter (3.11 to 3.13).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.tenfold-stamp

.PHONY: setup assets demo test test-slow bench lint clean

setup: assets

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

assets: $(STAMP)
	$(BIN)/tenfold assets get --default

demo: assets
	$(BIN)/tenfold demo

test: assets lint
	$(BIN)/pytest -q -n 2 --dist loadfile -m 'not slow and not gpu'

test-slow: assets
	$(BIN)/pytest -q -m 'slow and not gpu'

bench: $(STAMP)
	$(BIN)/tenfold bench all

# mypy does not follow the finder of an editable install, so it is shown the folders through a tree of links
lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	mkdir -p build/mypy/tenfold
	cd build/mypy/tenfold && for d in callbacks datamodules experiments inference kernels lightning_modules; do ln -sfn ../../../$$d $$d; done
	MYPYPATH=build/mypy $(BIN)/mypy -p tenfold

clean:
	rm -rf $(VENV) build dist *.egg-info
