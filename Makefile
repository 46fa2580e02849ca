# What one does often. `make sample` and `make test` set up all they need in .venv, with nothing but python3 before.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# On PyPI torch brings CUDA; the reference runs on CPU and has no further needs, so it is installed apart.
TORCH ?= torch==2.13.0
# jax for the accelerator at hand, beside requirements.txt: cuda13, tpu, or nothing.
ACCELERATOR ?= $(if $(shell command -v nvidia-smi),cuda13)
JAX := $(if $(ACCELERATOR),"jax[$(ACCELERATOR)]")
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
ARGS ?=
# A Python on which requirements.txt has the newest jax; on 3.11 it has the oldest.
NEWER ?= $(shell for p in python3.13 python3.12 $(HOME)/.pyenv/versions/3.1[2-9]*/bin/python3; do \
	path=$$(command -v $$p) && $$path -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null \
	&& echo $$path && break; done)
# Compilers for devices that are not here; in environments of their own, or jax would look for those devices.
AOT := .venv-aot
# Configs whose training steps `make aot` compiles; `make test-all` compiles those of all stages.
STEPS ?= configs/stage1_init.yaml
ALL_STEPS := $(patsubst %,configs/%.yaml,stage1_init stage2_init stage3_ode stage3_post)

.PHONY: sample test test-all test-light test-newest newer aot aot-oldest aot-newest gpu-report lint format bench check-kernels tune parity lock clean toy toy-data toy-vae toy-latents toy-stage1 toy-score chain

sample: $(VENV)/.run  ## sample a video of four chunks with the embedded model
	$(BIN)/python sample.py configs/toy/sample.yaml $(ARGS)

test: $(VENV)/.test  ## the tests, those against torch, diffusers and transformers included
	$(BIN)/python -m pytest -n 2 --dist worksteal -q -m "not heavy" $(ARGS)

test-all: $(VENV)/.test newer  ## what takes too long for every day, too: heavy tests, all training steps compiled for a pod
	$(BIN)/python -m pytest -n 2 --dist worksteal -q $(ARGS)
	$(MAKE) aot STEPS="$(ALL_STEPS)"

test-light: $(VENV)/.test-light  ## the tests that need no torch, without the slowest
	$(BIN)/python -m pytest -n 2 --dist worksteal -q -m "not reference and not slow and not heavy" $(ARGS)

test-newest: | newer  ## the same on the newest jax
	$(MAKE) test-light PYTHON=$(NEWER) VENV=.venv-newest

newer:
	@test -n "$(NEWER)" || { echo "the newest jax needs Python 3.12 or newer: make NEWER=/path/to/python3.12 ..."; exit 2; }

aot: | newer  ## compile the 14B model, its training steps and the kernels for TPUs and an H100; needs neither
	$(MAKE) -j2 --output-sync=target aot-oldest aot-newest
aot-newest: $(AOT)-newest/.aot
	$(AOT)-newest/bin/python -m pytest -q -s tests/aot $(ARGS)
	JAX_PLATFORMS=cpu $(AOT)-newest/bin/python -m helios_jax.benchmarks.aot_training $(STEPS)
aot-oldest: $(AOT)/.aot  ## what a release of jax may break: kernels, the block, the decoder, one training step
	$(AOT)/bin/python -m pytest -q -s tests/aot/test_h100.py tests/aot/test_norms.py -k "not sampler_fits and not v6e" $(ARGS)
	JAX_PLATFORMS=cpu $(AOT)/bin/python -m helios_jax.benchmarks.aot_training configs/stage1_init.yaml

lint: $(VENV)/.test  ## ruff, the contracts of imports, pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.test  ## time the sampler on what there is, beside diffusers, and write docs/benchmarks/
	$(BIN)/python -m helios_jax.benchmarks.throughput $(ARGS)

gpu-report: $(VENV)/.test  ## every figure of the GPU at hand in nine minutes, into docs/benchmarks/
	$(BIN)/python -m helios_jax.benchmarks.gpu_report $(ARGS)

check-kernels: $(VENV)/.run  ## the kernels' values and gradients beside their references', on the GPU or TPU at hand
	$(BIN)/python -m pallas_kernels.tools.check $(ARGS)

tune: $(VENV)/.run  ## time a kernel's block sizes on the GPU or TPU at hand: make tune ARGS="attention --write"
	$(BIN)/python -m pallas_kernels.tools.tune $(ARGS)

parity: $(VENV)/.test  ## measure our error against the references and write docs/parity.md
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(BIN)/python -m tests.parity.report docs/parity.md

# --- the toy world, from nothing to the embedded model ---
DATA := data/toy
LATENTS := data/toy-latents
TOY := helios_jax/assets/toy

toy: toy-data toy-vae toy-latents toy-stage1 toy-score
toy-data: $(VENV)/.run
	test -d $(DATA) || $(BIN)/python -m helios_jax.toy.build --out $(DATA) --videos 1800 --chunks 4
toy-vae: $(VENV)/.run
	$(BIN)/python train.py configs/toy/vae.yaml $(ARGS)
	$(BIN)/python train.py configs/toy/vae_long.yaml $(ARGS)
	cp -r runs/toy-vae-long/vae $(TOY)/
toy-latents: $(VENV)/.run
	test -d $(LATENTS) || $(BIN)/python -m helios_jax.precompute --videos $(DATA) --vae $(TOY)/vae --text $(TOY) --out $(LATENTS)
toy-stage1: $(VENV)/.run  ## on two CPU devices: small steps use two cores better that way
	XLA_FLAGS=--xla_force_host_platform_device_count=2 $(BIN)/python train.py configs/toy/stage1.yaml $(ARGS)
	cp -r runs/toy-stage1/pipeline/transformer $(TOY)/
toy-score: $(VENV)/.run  ## score the model on captions that training never saw
	$(BIN)/python -m helios_jax.toy.report --model $(TOY) --out docs/toy.md $(ARGS)

# --- the toy's three stages, each from the one before, as at 14B; `make chain` goes on where it was stopped ---
CHAIN := runs/toy-chain
TWO := XLA_FLAGS=--xla_force_host_platform_device_count=2
done = $(CHAIN)/$(1)/pipeline/model_index.json
# A stage ends with its export, whose index is written last; a run that was stopped, which exits
# with 0 too, goes on from its checkpoint.
train = $(TWO) $(BIN)/python train.py configs/toy/$(1).yaml $(ARGS) && test -f $@

chain: $(CHAIN)/report.md  ## stage 1 init, post, 2 init, post, 3 ODE, 3 DMD + GAN, export, and a report of them
$(CHAIN)/report.md: $(call done,stage3_distill) | $(VENV)/.test-light
	$(BIN)/python -m helios_jax.toy.chain_report --chain $(CHAIN) --out $@
$(call done,stage3_distill): $(call done,stage3_ode)
	$(call train,stage3_distill)
$(call done,stage3_ode): $(CHAIN)/ode.done
	$(call train,stage3_ode)
$(CHAIN)/ode.done: $(call done,stage2_post)
	$(BIN)/python -m helios_jax.toy.build --captions --videos 256 --out $(CHAIN)/captions.txt
	$(BIN)/python -m helios_jax.precompute ode --prompts $(CHAIN)/captions.txt --model $(CHAIN)/stage2_post/pipeline \
		--out $(CHAIN)/ode --size 64x64 --num-frames 132 --steps 20 20 20 --guidance-scale 3 --negative-prompt "" \
		--time-shift-type exponential --batch 32 --shard-size 64
	touch $@
$(call done,stage2_post): $(call done,stage2_init)
	$(call train,stage2_post)
$(call done,stage2_init): $(call done,stage1_post)
	$(call train,stage2_init)
$(call done,stage1_post): $(call done,stage1_init)
	$(call train,stage1_post)
$(call done,stage1_init): $(CHAIN)/wan/transformer/config.json | toy-data toy-latents
	$(call train,stage1_init)
$(CHAIN)/wan/transformer/config.json: | $(VENV)/.run
	$(BIN)/python -m helios_jax.toy.wan --model $(TOY) --out $(CHAIN)/wan

lock: $(VENV)/.test  ## requirements*.txt from pyproject.toml
	$(BIN)/uv pip compile pyproject.toml --universal --python-version 3.11 --no-header -q -o requirements.txt
	$(BIN)/uv pip compile pyproject.toml --universal --python-version 3.11 --no-header -q \
		--extra test --extra reference -c requirements.txt -o requirements-test.txt

clean:
	rm -rf $(VENV) $(AOT) $(AOT)-newest .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: requirements.txt | $(BIN)/python
	$(PIP) install -r requirements.txt $(JAX)
	@touch $@

$(VENV)/.test: requirements-test.txt | $(BIN)/python
	$(PIP) install $(TORCH)
	$(PIP) install -r requirements-test.txt $(JAX)
	@touch $@ $(VENV)/.run

$(VENV)/.test-light: requirements-test.txt | $(BIN)/python
	$(PIP) install -r requirements-test.txt $(JAX)
	@touch $@ $(VENV)/.run

$(AOT)/.aot: AOT_PYTHON = $(PYTHON)
$(AOT)-newest/.aot: AOT_PYTHON = $(NEWER)
$(AOT)/.aot $(AOT)-newest/.aot: requirements.txt requirements-aot.txt
	$(AOT_PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip --disable-pip-version-check -q install -r requirements.txt -r requirements-aot.txt
	@touch $@
