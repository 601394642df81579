# make demo   set up, train the embedded digits recipe, test it, classify some images
# make test   set up, run the test suite (offline; some minutes on two cores)
# make check  set up, then lint, format, types and tests
PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
SOURCES := src tests benchmarks

.PHONY: demo test check lint types bench-overhead bench-gpu clean

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

check: $(VENV)/.dev lint types test

lint: $(VENV)/.dev
	$(BIN)/ruff check $(SOURCES) examples experiments
	$(BIN)/ruff format --check $(SOURCES) examples experiments

types: $(VENV)/.dev
	$(BIN)/mypy

bench-overhead: $(VENV)/.dev
	@$(BIN)/python benchmarks/overhead.py

# On a machine with a GPU and no environment of ours: only a python3 with torch, torchvision and
# pydantic is needed. Checkouts of the peers: AIRBENCH=... HIVERGE=... (none: ours alone).
bench-gpu: export PYTHONPATH := $(CURDIR)/src
bench-gpu:
	$(PYTHON) benchmarks/roofline.py
	$(PYTHON) benchmarks/warm.py mnist-fast
	$(PYTHON) benchmarks/cifar_speed.py $(if $(AIRBENCH),--airbench $(AIRBENCH)) $(if $(HIVERGE),--hiverge $(HIVERGE))
	$(PYTHON) benchmarks/report.py

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache

# The environment. uv installs torch in half a minute where pip takes minutes, so it is tried
# first; a machine whose registry only pip knows of (pip.conf) falls back to pip.
$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check uv

define install
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -c constraints.txt -e '.$(1)' \
	  || $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.$(1)'
endef

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(call install,)
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(call install,[dev])
	touch $@ $(VENV)/.demo

BENCHMARKS.md: $(wildcard benchmarks/results/*.json) benchmarks/report.py
	$(BIN)/python benchmarks/report.py
