# One environment at the root, made from a bare Python 3.11+; every target sets up what it needs and is quick the second time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# uv knows nothing of pip's settings; a local wheel folder given to pip is given to uv as well.
FIND_LINKS := $(addprefix --find-links ,$(PIP_FIND_LINKS))
UV_INSTALL := $(BIN)/uv pip install --quiet --python $(BIN)/python $(FIND_LINKS) --constraint constraints.txt

.PHONY: quickstart quickstart-moe quickstart-search scaling-law test interop lint types setup setup-dev runtime-aarch64 fuzz clean
.DEFAULT_GOAL := quickstart

$(BIN)/uv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is $$($(PYTHON) -V), Pocketforge needs 3.11 or newer; make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv

RUNTIME := $(wildcard kernels/cpu/CMakeLists.txt kernels/cpu/include/*.h kernels/cpu/src/*) kernels/build.py

$(VENV)/.ready: $(BIN)/uv pyproject.toml constraints.txt $(RUNTIME)
	$(UV_INSTALL) --editable .
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(UV_INSTALL) --editable '.[dev,search]'
	@touch $@

# llama.cpp is compiled from source: minutes the first time. A package that does not import fails here, not as a skipped test.
$(VENV)/.ready-interop: $(VENV)/.ready-dev
	$(UV_INSTALL) --editable '.[interop]'
	$(BIN)/python -W ignore -c 'import executorch.runtime, gguf, llama_cpp, onnx, onnxruntime'
	@touch $@

setup: $(VENV)/.ready
setup-dev: $(VENV)/.ready-dev

# The optimizers of the search come on top.
$(VENV)/.ready-search: $(VENV)/.ready
	$(UV_INSTALL) --editable '.[search]'
	@touch $@

quickstart: setup
	$(BIN)/python launch/recipe.py --recipe quickstart --output-dir runs/quickstart --resume

quickstart-moe: setup
	$(BIN)/python launch/recipe.py --recipe tiny_moe --output-dir runs/tiny_moe --resume

# Goes on where it was interrupted; a finished one only writes its page again.
quickstart-search: $(VENV)/.ready-search
	@if [ -f runs/quickstart_search/sweep.toml ]; then set -x; $(BIN)/python launch/sweep.py resume runs/quickstart_search; \
	else set -x; $(BIN)/python launch/sweep.py --recipe quickstart_search --output-dir runs/quickstart_search; fi

# Tiny models, dense and with experts, and the law of their losses; goes on where it was interrupted.
scaling-law: $(VENV)/.ready-search
	OMP_NUM_THREADS=1 $(BIN)/python launch/scaling_law.py ladder --output-dir runs/scaling-law

lint: setup-dev
	$(BIN)/ruff check .

types: setup-dev
	$(BIN)/mypy

test: lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2 --max-worker-restart 0

# Twenty minutes of mutated packed files under the sanitizers; needs clang (Debian: clang, libclang-rt-14-dev).
FUZZ_SECONDS ?= 1200
fuzz: setup
	cmake -S kernels/cpu -B build/fuzz -DCMAKE_C_COMPILER=clang -DCMAKE_CXX_COMPILER=clang++ -DPOCKETFORGE_FUZZ=ON -DPOCKETFORGE_SANITIZE=ON
	cmake --build build/fuzz --target pocketforge-fuzz
	$(BIN)/python -m tests.kernels.make_corpus build/fuzz/corpus
	build/fuzz/pocketforge-fuzz -max_len=20000 -max_total_time=$(FUZZ_SECONDS) -print_final_stats=1 build/fuzz/corpus

# The runtime for 64-bit Arm, its programs static; tests run them in an emulator where both are there.
runtime-aarch64:
	.ci/system-packages
	cmake -S kernels/cpu -B build/cross-aarch64 -DCMAKE_TOOLCHAIN_FILE=$(CURDIR)/kernels/cpu/aarch64.cmake
	cmake --build build/cross-aarch64 --parallel 2
	cmake --install build/cross-aarch64 --prefix build/cross-aarch64

interop: $(VENV)/.ready-interop
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/interop

clean:
	rm -rf $(VENV) build kernels/lib *.egg-info
