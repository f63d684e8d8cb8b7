# `make run` and `make test` set up what they need. PYTHON picks the interpreter that the environment is made from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= run
TORCH := $(shell sed -n 's/^\(torch==.*\)/\1/p' constraints.txt)

.PHONY: run test check setup setup-test clean

run: setup ## measure, plan, launch, train, report
	$(BIN)/layout-advisor demo --out $(OUT)

# Two workers: while the ranks of one wait for each other, the other's compute. The tests of a module share a worker, and
# so the trainings and models that its fixtures make. Not the modules of most tests first, but in the order that
# tests/conftest.py gives: the many short ones of tests/unit fill both workers up to the end.
test: setup-test ## all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

check: setup-test ## style, types, import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

setup: $(VENV)/.installed
setup-test: $(VENV)/.installed-test

# torch first and pinned: as somebody's dependency it would be whichever build is newest.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/python -m pip install --quiet $(TORCH) --constraint constraints.txt numpy
	$(BIN)/python -m pip install --quiet --editable . --constraint constraints.txt
	touch $@

# transformers imports torchao wherever it finds it, seconds and warnings a process: the tests of fp8 have it in a folder.
# deepspeed builds its kernels at install time unless told not to, and needs the torch that is already here.
$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[test,mpi,megatron]' --constraint constraints.txt
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[deepspeed]' --constraint constraints.txt
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/torchao torchao --constraint constraints.txt
	touch $@

clean:
	rm -rf $(VENV) $(OUT)
