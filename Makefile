# Each target is the only command needed: the first one to run makes .venv.
PYTHON ?= python3
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
MODALITY ?= image
DEMO_READY := $(VENV)/.demo-$(MODALITY)-ready
CHECK_PYTHON := $(PYTHON) -c 'import sys; sys.exit("Python >= 3.10 is needed, and $(PYTHON) is older. Try: make PYTHON=python3.11" if sys.version_info < (3, 10) else 0)'

.PHONY: help demo test lint types check docs format bench reproduce-tiny soak audit clean

help:
	@echo "make demo     calibrate, plan and run the demo pipeline; prints a table, writes a report"
	@echo "              (MODALITY=video or audio for the other demos)"
	@echo "make test     run the tests and the examples in the documentation of the code"
	@echo "make lint     check style            make types    check types"
	@echo "make check    all three              make format   rewrite the code in the house style"
	@echo "make bench    measure speed and cost make docs     build the documentation into site/"
	@echo "make reproduce-tiny   run the scripts of the paper's tables on small pipelines"
	@echo "make soak     generate for MINUTES=10 under faults, and watch memory, files and threads"
	@echo "make audit    check the pinned versions against published advisories (needs a network)"
	@echo "make clean    remove .venv and everything built"

# Only what the demo needs, and not what the tests do.
demo: $(DEMO_READY)
	$(BIN)/smoothcache demo --modality $(MODALITY)

$(DEMO_READY): pyproject.toml constraints.txt
	@$(CHECK_PYTHON)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[$(subst image,demo,$(MODALITY))]'
	@touch $@

# One thread for each of the JOBS processes: the cores are shared out once. A file's tests run in one
# process, so that what they share is made once.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist loadfile $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

check: lint types test

# Strict: a link that leads nowhere fails, and so does a public name without a docstring.
docs: $(READY)
	$(BIN)/pytest -q tests/test_docstrings.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The tables of the paper from end to end, on small pipelines: that the scripts run, no values.
reproduce-tiny: $(READY)
	@for script in reproduce/table[1-3].py; do \
		echo "==> $$script --tiny"; \
		$(BIN)/python "$$script" --tiny || exit 1; \
	done

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	@for script in benchmarks/[a-z]*.py; do \
		echo "==> $$script"; \
		$(BIN)/python "$$script" || exit 1; \
	done

MINUTES ?= 10
soak: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/soak.py --minutes $(MINUTES)

# In an environment of its own, because the tool is no dependency of anything here.
AUDIT := .venv-audit
audit:
	test -x $(AUDIT)/bin/pip-audit || { $(PYTHON) -m venv $(AUDIT) && $(AUDIT)/bin/pip install --quiet pip-audit; }
	$(AUDIT)/bin/pip-audit --requirement constraints.txt --disable-pip --no-deps

# A codebase that layers are looked for in. All that it asks for is much (a GUI, trackers), and in
# versions that suit nothing else; its transformer needs einops alone.
UNBOUND := stable-audio-tools==0.0.19

# The stamp is written last: an installation that broke off is taken up again.
$(READY): pyproject.toml constraints.txt
	@$(CHECK_PYTHON)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --no-deps $(UNBOUND)
	@touch $@ $(foreach name,image video audio,$(VENV)/.demo-$(name)-ready)

clean:
	rm -rf $(VENV) $(AUDIT) build dist out site .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests benchmarks training -name __pycache__ -type d -prune -exec rm -rf {} +
