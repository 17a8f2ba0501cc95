# demo, test, bench, docs and lint set up their own virtual environment; gpu uses the Python found on PATH and no network.
PYTHON ?= python3
VENV ?= .venv
OUTPUT ?= out
RESULTS ?= bench/results
GPU_PARTS ?= tests,sanitize,kernels,bench
# For all parts together.
GPU_SECONDS ?= 540

RUN := $(VENV)/bin/python
# Modules are compiled when they are first imported: compiling all of them takes as long as all the rest.
INSTALL = $(RUN) -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-wide test-all test-versions bench gpu hub docs lint clean

demo: $(VENV)/.test
	$(RUN) -m fastlenet.training.demo --output $(OUTPUT)

test: $(VENV)/.test
	$(RUN) tests/run.py

# What `make test` leaves out: every value of every parameter once.
test-wide: $(VENV)/.test-all
	$(RUN) tests/run.py --tier wide --rest

test-all: $(VENV)/.test-all
	$(RUN) tests/run.py --tier all

# The oldest and the newest PyTorch, each in an environment of its own under $(OUTPUT)/versions.
test-versions:
	$(PYTHON) tests/versions.py $(OUTPUT)/versions

bench: $(VENV)/.test
	$(RUN) -m fastlenet bench --results $(RESULTS)

gpu:
	$(PYTHON) bench/gpu.py --parts $(GPU_PARTS) --seconds $(GPU_SECONDS) --results $(RESULTS)

# Lays the library out as Hugging Face's `kernels` loads it.
hub: $(VENV)/bin/python
	$(RUN) hub/build.py $(OUTPUT)/hub

# The documentation as a site: open site/index.html, or serve it (python -m http.server -d site), which search needs.
# A broken link or docstring ends the build.
# mkdocs-material prints an advertisement at each build unless the variable is set.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

lint: $(VENV)/.dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

clean:
	rm -rf $(VENV) $(OUTPUT) build site *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.test: $(VENV)/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e '.[test]'
	touch $@

$(VENV)/.test-all: $(VENV)/.test
	$(INSTALL) -e '.[test-all]'
	touch $@

$(VENV)/.dev: $(VENV)/.test
	$(INSTALL) -e '.[dev]'
	touch $@

$(VENV)/.docs: $(VENV)/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e '.[docs]'
	touch $@
