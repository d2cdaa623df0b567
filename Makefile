# `make` alone lists the targets.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
INSTALLED := $(VENV)/.installed
# The tests' models are tiny: threads gain nothing, and fight where other work runs.
PYTEST ?= OMP_NUM_THREADS=1 $(BIN)/python -m pytest
# Half of the tests wait for processes: two run at a time, JOBS=0 for one.
JOBS ?= 2
AT_A_TIME = -n $(JOBS) --dist worksteal
# Empty: see tests/conftest.py.
SERVER ?=
ON_SERVER = $(if $(SERVER),BATCHMILL_REDIS_SERVER=$(SERVER))
# libstdc++ as well, or the sanitizer doesn't know how torch throws; Python's own leaks are not ours.
SANITIZED = LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so.6)" \
  ASAN_OPTIONS=detect_leaks=0 XDG_CACHE_HOME=$(CURDIR)/build/sanitize \
  CC="gcc -fsanitize=address,undefined -fno-sanitize-recover=undefined -g"

.PHONY: help install demo test test-servers lint types format check floors inputs report-picture bench bench-cache bench-queue chaos sanitize cluster clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-15s %s\n", $$1, $$2}'

install: $(INSTALLED) ## Install everything into .venv

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@# torch first, by exact version: whatever comes later then finds it there
	$(BIN)/python -m pip install --quiet -c constraints.txt "$(TORCH)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@# what structured output needs, without triton (of many times the size), which only GPUs use
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps xgrammar apache-tvm-ffi
	@touch $@

demo: $(INSTALLED) ## Run the main job on the bundled toy model: 240 prompts, 2 workers of 2 stages
	@mkdir -p out && rm -f out/demo.jsonl
	$(BIN)/batchmill run examples/prompts.jsonl -o out/demo.jsonl --workers 2 --stages cpu,cpu --show 6

test: $(INSTALLED) ## Run the tests, on the Redis that a wheel brings or SERVER=path
	$(ON_SERVER) $(PYTEST) $(AT_A_TIME)

test-servers: $(INSTALLED) ## Run the tests that depend on the Redis server, on SERVER=path
	$(ON_SERVER) $(PYTEST) $(AT_A_TIME) -m "servers and not slow"

lint: $(INSTALLED) ## Check format and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(INSTALLED) ## Check types
	$(BIN)/mypy

format: $(INSTALLED) ## Format the sources and mend what lint can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: lint types test ## Lint, types and tests

floors: ## Draw docs/floors.svg, the wings and their imports, from the sources
	PYTHONPATH=tests $(PYTHON) docs/draw_floors.py docs/floors.svg

inputs: $(INSTALLED) ## Write docs/inputs.md, the table of input files, from the tests' list
	PYTHONPATH=tests $(BIN)/python docs/list_inputs.py docs/inputs.md

report-picture: $(INSTALLED) ## Test the page of --report in Chromium (pip install playwright) and save docs/report.png
	REPORT_PICTURE=docs/report.png $(PYTEST) -m slow tests/test_report_browser.py

bench: $(INSTALLED) ## Measure bulk generation beside transformers and the peers installed (extra "bench")
	$(BIN)/python -m benchmarks.throughput $(BENCH)

bench-cache: $(INSTALLED) ## Measure the cache's worth and the time per token; put questions to a cut model
	$(BIN)/python benchmarks/cache_speedup.py
	$(BIN)/python benchmarks/per_token_time.py
	$(BIN)/python benchmarks/question_answer.py

bench-queue: $(INSTALLED) ## Measure the queue beside RQ, arq, saq, taskiq and bare Streams (those installed)
	$(BIN)/python -m benchmarks.job_queue $(BENCH_QUEUE)

chaos: $(INSTALLED) ## Kill workers, clients and Redis at random, and see that nothing is lost (CHAOS="--kills 50 …")
	$(BIN)/python -m benchmarks.chaos $(CHAOS)

sanitize: $(INSTALLED) ## Run the tests of the native code with gcc's address and undefined-behaviour sanitizers
	@# without a library its tests would be skipped, and all would look well
	$(SANITIZED) $(BIN)/python -c 'import sys; from engine.kernels.native_library import native_library; \
	  assert all(map(native_library, sys.argv[1:]))' $(basename $(notdir $(wildcard engine/kernels/*.c)))
	$(SANITIZED) $(PYTEST) -p no:cacheprovider tests/test_engine_panel_product.py \
	  tests/test_engine_native_attention.py tests/test_engine_fused_layers.py \
	  tests/test_engine_int8.py tests/test_engine_last_layer.py

cluster: ## Start Redis and workers with docker compose
	docker compose up --build

clean: ## Remove what the targets above made
	rm -rf $(VENV) out build *.egg-info
