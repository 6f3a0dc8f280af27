# One command each: make distill, make test, make lint, make bench. Everything lives in .venv and runs/.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
CONFIG ?= configs/digits.yaml
ARGS ?=

# CUDA kernels take minutes to compile: only where there is a GPU.
export DIMO_EXT_CUDA ?= $(if $(shell nvidia-smi -L 2>/dev/null),auto,off)

BIN := $(VENV)/bin
SOURCES := $(shell find csrc dimo_ext python -type f -not -path '*/__pycache__/*' 2>/dev/null) pyproject.toml CMakeLists.txt
CXX_SOURCES := $(shell find csrc tests/cuda_on_cpu -type f -name '*.*')
OPERATOR_TESTS := $(patsubst %,tests/test_%.py,accuracy cross_entropy determinism divergence divergence_in_place \
  divergence_limits embedding gpu large masked_rows masking matching_loss operators random reveal sampling)

.PHONY: help setup distill table pretrain doctor test test-full sanitize lint format docs failures bench step-table clean

help:
	@echo "make distill    set up, distil the digits teacher into a one-step generator: runs/digits/"
	@echo "make test       set up, run every test against the installed wheel"
	@echo "make test-full  the same with many more hypothesis examples and the whole cross products"
	@echo "make sanitize   the CUDA kernels on the CPU under AddressSanitizer, UBSan and ThreadSanitizer"
	@echo "make pretrain   train the digits teacher anew: runs/digits_teacher/"
	@echo "make lint       ruff and clang-format;  make format rewrites"
	@echo "make docs       docs/api.md from the docstrings"
	@echo "make table      the README's table of the digits from three training seeds: runs/digits-0 ..."
	@echo "make failures   docs/failures.md from short distillations that go wrong: runs/failures/"
	@echo "make bench      time the operators and a training step: benchmarks/results/"
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
	DIMO_SANITIZE=1 $(BIN)/pytest tests/test_shim.py $(ARGS)

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

# The teacher's rows take as long as a training: they are measured once, with more seeds.
table: setup
	for seed in 0 1 2; do \
	  $(BIN)/dimo distill --config configs/digits.yaml --run.seed $$seed --run.output runs/digits-$$seed \
	    $$([ $$seed = 0 ] && echo --report.teacher-seeds 3 --report.teacher-steps 1 2 4 8 16 64 || echo --report.teacher-steps 1) || exit 1; done
	$(BIN)/python -P scripts/digits_table.py runs/digits-0 runs/digits-1 runs/digits-2

failures: setup
	$(BIN)/python -P scripts/failures.py $(ARGS)

bench: setup
	@for file in benchmarks/bench_*.py; do \
	  $(BIN)/python $$file --out benchmarks/results/$$(basename $$file .py).csv || exit 1; done
	@for preset in digits maskgit-imagenet256 meissonic-shape mdlm-owt; do \
	  $(BIN)/python benchmarks/step_time.py $$preset --out benchmarks/results/step_time_$$preset.csv || exit 1; done
	@$(MAKE) --no-print-directory step-table

step-table: setup
	$(BIN)/python -P scripts/step_table.py

clean:
	rm -rf $(VENV) build dist
