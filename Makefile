# Everything runs in a virtual environment, which the first command makes: .venv, or, where the checkout's path has a
# space, one in the user's cache, because torch.compile cannot link against libraries below a path with a space.
PYTHON ?= python3
EMPTY :=
ifneq (,$(findstring $(EMPTY) $(EMPTY),$(CURDIR)))
VENV := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/subspace-meta/$(shell printf %s "$(CURDIR)" | cksum | cut -d' ' -f1)
else
VENV := .venv
endif
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test test-slow test-rounding test-processors test-gpu test-oldest check numbers docs proofs clean

demo: $(INSTALLED)  ## meta-train in minutes, then compare with tuned baselines
	$(RUN) -m subspace_meta.cli train --preset quick

test: $(INSTALLED)  ## the test suite, a few minutes on two cores
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 --dist worksteal -m "not slow"

test-slow: $(INSTALLED)  ## the heavier checks
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 --dist worksteal -m slow

# What another processor rounds differently.
PROCESSORS := MKL_CBWR=COMPATIBILITY MKL_CBWR=AVX2 ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 \
	ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=2

test-rounding: $(INSTALLED)  ## the tests that compare different operations, with another instruction set of MKL
	OMP_NUM_THREADS=1 MKL_CBWR=COMPATIBILITY $(RUN) -m pytest -q -n 2 --dist worksteal \
		-m "not slow" tests/optimizers tests/properties tests/adapter tests/manifolds/test_battery.py

test-processors: $(INSTALLED)  ## the whole suite, slow tests too, under other instruction sets and with two threads
	@for setting in $(PROCESSORS); do \
		cache=$(abspath $(VENV))/compiled/$$(echo $$setting | tr = -); \
		echo "$$setting: $$(env OMP_NUM_THREADS=1 TORCHINDUCTOR_CACHE_DIR=$$cache $$setting $(RUN) -m pytest -q -n 2 \
			--dist worksteal -m "not gpu" -p no:cacheprovider | tail -n 1)"; \
	done

# The oldest torch that the eager library takes, in an environment of its own; its wheel needs CUDA's libraries, too.
OLDEST := $(abspath $(VENV))-oldest
OLDEST_TESTS := tests/test_geometry.py tests/test_rules.py tests/test_checkpoint.py tests/adapter tests/manifolds \
	tests/properties tests/optimizers --ignore tests/optimizers/test_sharded.py --ignore tests/optimizers/test_optim_states.py

test-oldest: $(OLDEST)/.installed  ## the eager library with the oldest torch it takes; 3 GB of packages
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -q -n 2 --dist worksteal -m "not slow" -o filterwarnings=default \
		-p no:cacheprovider -k "not compile and not traced and not transforms_of" $(OLDEST_TESTS)

$(OLDEST)/.installed: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -q torch==2.1.2 "numpy<2"
	$(OLDEST)/bin/python -m pip install -q -e ".[train]" "numpy<2" pytest pytest-xdist hypothesis
	touch $(OLDEST)/.installed

test-gpu: $(INSTALLED)  ## this machine's GPU: the kernels' correctness, bandwidth, time beside Adam; meta-training
	$(RUN) -m pytest -q -s -m gpu tests/kernels tests/meta/test_devices.py

check: $(INSTALLED)  ## linter, formatter, type checker
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# RESULTS="a/results.json b/results.json" takes over reports that are there; without it the shipped weights are evaluated.
numbers: $(INSTALLED)  ## the numbers of README, results and model card, and the picture: half an hour on a core
	$(RUN) docs/make/quote.py $(or $(RESULTS),--measure runs/numbers)
	$(RUN) docs/figures.py

docs: $(VENV)/.docs  ## the documentation site, into site/; any warning is an error, every link is checked
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict
	$(RUN) docs/make/check.py site

$(VENV)/.docs: $(INSTALLED)
	$(RUN) -m pip install -q -c constraints.txt -e ".[docs]"
	touch $(VENV)/.docs

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -c constraints.txt torch numpy
	$(RUN) -m pip install -q -c constraints.txt -e ".[test]"
	touch $(INSTALLED)

proofs:  ## check the proofs with Coq; says which Debian packages it needs
	$(MAKE) -C proofs check

clean:
	rm -rf $(VENV) $(OLDEST) site .pytest_cache .hypothesis .mypy_cache .ruff_cache
