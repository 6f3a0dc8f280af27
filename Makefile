# One command each: make distill, make test, make lint, make bench. Everything lives in .venv and runs/.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
CONFIG ?= configs/digits.yaml
ARGS ?=

BIN := $(VENV)/bin
SOURCES := $(shell find csrc dimo_ext python -type f -not -path '*/__pycache__/*' 2>/dev/null) pyproject.toml CMakeLists.txt
CXX_SOURCES := $(shell find csrc tests/cuda_on_cpu -type f -name '*.*')
OPERATOR_TESTS := $(addprefix tests/test_,divergence.py cross_entropy.py sampling.py masking.py embedding.py random.py operators.py)

.PHONY: help setup distill pretrain doctor test test-full sanitize lint format docs bench clean

help:
	@echo "make distill    set up, distil the digits teacher into a one-step generator: runs/digits/"
	@echo "make test       set up, run every test against the installed wheel"
	@echo "make test-full  the same with many more hypothesis examples"
	@echo "make sanitize   the CUDA kernels on the CPU under AddressSanitizer, UBSan and ThreadSanitizer"
	@echo "make pretrain   train the digits teacher anew: runs/digits_teacher/"
	@echo "make lint       ruff and clang-format;  make format rewrites"
	@echo "make docs       docs/api.md from the docstrings"
	@echo "make bench      time the operators: benchmarks/results/"
	@echo "make doctor     what was built, what serves which device"
	@echo "variables: PYTHON=$(PYTHON) VENV=$(VENV) TORCH=$(TORCH) CONFIG=$(CONFIG) ARGS='--run.seed 1'"

# The stamps stand for finished installs, so an interrupted one is done again. torch comes first and alone: its version
# is pinned here, while the package accepts any torch >= 2.6.
TORCH_STAMP := $(VENV)/.$(subst =,-,$(TORCH))

$(TORCH_STAMP):
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	@touch $@

$(VENV)/.package: $(TORCH_STAMP) $(SOURCES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '.[train]'
	@touch $@

$(VENV)/.test: $(VENV)/.package
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'dimo-ext[test]'
	@touch $@

$(VENV)/.lint:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(sed -n 's/^lint = \[\(.*\)\]/\1/p' pyproject.toml | tr -d '",')
	@touch $@

setup: $(VENV)/.package

distill: setup
	$(BIN)/dimo distill --config $(CONFIG) $(ARGS)

pretrain: setup
	$(BIN)/dimo pretrain --config configs/digits_teacher.yaml $(ARGS)

doctor: setup
	@$(BIN)/dimo doctor

# Against the installed wheel with its compiled module, then the operators once more on the reference alone.
test: $(VENV)/.test
	DIMO_EXT_REQUIRE_NATIVE=1 $(BIN)/pytest $(ARGS)
	DIMO_EXT_BACKEND=reference $(BIN)/pytest $(OPERATOR_TESTS) $(ARGS)

test-full: $(VENV)/.test
	HYPOTHESIS_PROFILE=full $(MAKE) test

# Without a GPU: tests/cuda_on_cpu runs the kernels' own source.
sanitize: $(VENV)/.test
	DIMO_SANITIZE=1 $(BIN)/pytest tests/test_cuda_on_cpu.py $(ARGS)

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

docs: setup
	$(BIN)/python -P scripts/api_page.py

bench: setup
	@for file in benchmarks/bench_*.py; do \
	  $(BIN)/python $$file --out benchmarks/results/$$(basename $$file .py).csv || exit 1; done

clean:
	rm -rf $(VENV) build dist
