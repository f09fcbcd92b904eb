# The two commands: `make quickstart` and `make test`. Each sets up what it needs, once.
PYTHON ?= python3
VENV := .venv
VENV5 := .venv-5x
VENV_LOWEST := .venv-lowest
PYTEST_FLAGS ?=
SUITE ?= quick
# One thread each: next to another busy process, two threads wait for each other most of the time.
TEST := -m pytest -n auto
ONE_THREAD := OMP_NUM_THREADS=1

# Optimum's exporter holds these at the versions of transformers 4.57.
ONLY_4 := transformers|huggingface_hub|tokenizers|optimum|optimum-onnx

.PHONY: setup setup-5x quickstart test test-all test-5x test-lowest benchmarks docs lint format help-texts clean
.DELETE_ON_ERROR:

setup: $(VENV)/.stamp
# The newest transformers 5 of the day, whatever an earlier set-up has found.
setup-5x: $(VENV5)/.stamp
	$(VENV5)/bin/pip install -q -U 'transformers>=5,<6'

quickstart: setup
	$(VENV)/bin/hf-holo train --overwrite

test: lint
	$(ONE_THREAD) $(VENV)/bin/python $(TEST) -m "not slow" $(PYTEST_FLAGS)

# With both major versions of transformers, also where the first fails.
test-all: lint setup-5x
	failed=0; for env in $(VENV) $(VENV5); do \
		$(ONE_THREAD) $$env/bin/python $(TEST) --what-works=docs/what-works.md $(PYTEST_FLAGS) || failed=1; \
	done; exit $$failed

test-5x: setup-5x
	$(ONE_THREAD) $(VENV5)/bin/python $(TEST) -m "not slow" $(PYTEST_FLAGS)

# With the oldest releases that pyproject.toml admits.
test-lowest: $(VENV_LOWEST)/.stamp
	$(ONE_THREAD) $(VENV_LOWEST)/bin/python $(TEST) -m "not slow" $(PYTEST_FLAGS)

# SUITE=quick|all; RESULTS names another folder than benchmarks/results, and inputs are variables (benchmarks/README.md).
benchmarks: setup
	$(VENV)/bin/python benchmarks/run.py $(SUITE) $(if $(RESULTS),--results $(RESULTS))

# The site, in build/site: start at build/site/index.html.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: setup
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# What `hf-holo VERB --help` says; a test compares it with the parsers.
help-texts: setup setup-5x
	for env in $(VENV5) $(VENV); do $$env/bin/python tests/help_texts.py || exit 1; done

clean:
	rm -rf $(VENV) $(VENV5) $(VENV_LOWEST)

# The stamps are written last: an interrupted set-up starts again where pip left off.
$(VENV)/.stamp: pyproject.toml constraints.txt
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q -c constraints.txt -e '.[onnx,eval,dev]'
	touch $@

$(VENV5)/.stamp: pyproject.toml constraints.txt
	test -x $(VENV5)/bin/pip || $(PYTHON) -m venv $(VENV5)
	grep -vE '^($(ONLY_4))==' constraints.txt > $(VENV5)/constraints.txt
	$(VENV5)/bin/pip install -q -U -c $(VENV5)/constraints.txt -e '.[eval,dev,serve]' 'transformers>=5,<6'
	touch $@

# Lower bounds with extras in brackets are those of other majors (serving) or of GPUs.
$(VENV_LOWEST)/.stamp: pyproject.toml
	test -x $(VENV_LOWEST)/bin/pip || $(PYTHON) -m venv $(VENV_LOWEST)
	grep -oE '"[A-Za-z_-]+>=[0-9.]+' pyproject.toml | tr -d '"' | sed 's/>=/==/' > $(VENV_LOWEST)/constraints.txt
	$(VENV_LOWEST)/bin/pip install -q -c $(VENV_LOWEST)/constraints.txt -e '.[onnx,eval,dev]'
	touch $@
