# Needs Python and pip alone. `make demo` and `make test` build .venv on first use and again when its inputs change.
PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH := $(shell sed -n 's/^\(torch==.*\)$$/\1/p' constraints.txt)
SOURCES := hf_distill tests scripts benchmarks docs/*.py

.PHONY: demo test lint quality docs clean

# torch comes first and alone, so that no range of another package can pull a second build of it.
$(STAMP): pyproject.toml constraints.txt
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt "$(TORCH)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test,lint,hpo,quantised,docs]'
	touch $@

demo: $(STAMP)  ## train a teacher and its students on the bundled data, and compare them
	$(BIN)/python scripts/demo.py

test: $(STAMP)  ## the whole suite, slow tests included
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --durations=40

lint: $(STAMP)  ## complain
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

quality: $(STAMP)  ## mend what can be mended
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

docs: $(STAMP)  ## the site, into build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist
