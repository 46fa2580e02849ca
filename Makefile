# Common tasks. `make sample` and `make test` set up .venv themselves and need only python3.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# torch is installed separately: the usual build brings CUDA, and the reference runs on CPU.
TORCH ?= torch==2.13.0
# Extra of jax for this machine's accelerator, besides requirements.txt: cuda13, tpu, or nothing.
ACCELERATOR ?= $(if $(shell command -v nvidia-smi),cuda13)
JAX := $(if $(ACCELERATOR),"jax[$(ACCELERATOR)]")
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
# Without bytecode every process, and the tests start hundreds, would compile all that it imports.
unexport PYTHONDONTWRITEBYTECODE
ARGS ?=
# A Python for which requirements.txt has the newest jax. For Python 3.11 it has the oldest.
NEWER ?= $(shell for p in python3.13 python3.12 $(HOME)/.pyenv/versions/3.1[2-9]*/bin/python3; do \
	path=$$(command -v $$p) && $$path -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null \
	&& echo $$path && break; done)
# Marks of the tests that need neither torch nor minutes.
LIGHT := not reference and not slow and not heavy
# Environments with compilers for absent devices. They are separate, because jax would look for those devices.
AOT := .venv-aot
# Marks of the planner's tests: the heavy ones compile all stages and the rows of docs/pods.md, some minutes each.
PLANS ?= not heavy

.PHONY: sample test test-all test-light test-newest environments newer aot aot-oldest aot-newest aot-steps gpu-report fuzz lint format bench check-kernels tune parity lock clean toy toy-data toy-vae toy-latents toy-stage1 toy-mid toy-distilled toy-score chain scenes

SAMPLE = $(BIN)/python sample.py configs/toy/sample.yaml --overwrite
sample: $(VENV)/.run  ## sample with the embedded model: from text, and without ARGS also from an image, a video, two prompts
	$(SAMPLE) $(ARGS)
ifeq ($(ARGS),)
	$(SAMPLE) --image helios_jax/assets/toy_bar.png --prompt "a green vertical bar moves left slowly on a navy background" --out outputs/toy-image.mp4
	$(SAMPLE) --video outputs/toy.mp4 --out outputs/toy-video.mp4
	$(SAMPLE) --then 2 "a blue plus moves down slowly on a navy background" --interpolation-steps 0 --out outputs/toy-switch.mp4
endif

test: $(VENV)/.test  ## run the tests, including those against torch, diffusers and transformers
	$(BIN)/python -m pytest -n 2 --dist worksteal -q -m "not heavy" $(ARGS)

test-all: $(VENV)/.test newer  ## run all tests, including the heavy ones, and compile all training steps for a pod
	$(BIN)/python -m pytest -n 2 --dist worksteal -q $(ARGS)
	$(MAKE) aot PLANS=

test-light: $(VENV)/.test-light  ## run the tests that need no torch, without the slow ones
	$(BIN)/python -m pytest -n 2 --dist worksteal -q -m "$(LIGHT)" $(ARGS)

test-newest: | newer  ## run the tests of test-light that a release of jax can break, on the newest
	$(MAKE) test-light PYTHON=$(NEWER) VENV=.venv-newest LIGHT="$(LIGHT) and not plain"

# What lint does not install: pip and pyright take one core each.
environments: $(AOT)/.aot $(AOT)-newest/.aot | newer
	$(MAKE) $(VENV)-newest/.test-light PYTHON=$(NEWER) VENV=$(VENV)-newest

newer:
	@test -n "$(NEWER)" || { echo "the newest jax needs Python 3.12 or newer: make NEWER=/path/to/python3.12 ..."; exit 2; }

aot: | newer  ## compile the 14B model, its training steps and the kernels for TPUs and an H100; needs neither
	$(MAKE) -j2 --output-sync=target aot-newest aot-oldest aot-steps
aot-newest: $(AOT)-newest/.aot
	$(AOT)-newest/bin/python -m pytest -q -s tests/aot --ignore tests/aot/test_plan.py $(ARGS)
aot-steps: $(AOT)-newest/.aot
	$(AOT)-newest/bin/python -m pytest -q -s tests/aot/test_plan.py -m "$(PLANS)"
aot-oldest: $(AOT)/.aot  ## compile the programs that a jax release may break: kernels, block, decoder, one training step
	$(AOT)/bin/python -m pytest -q -s tests/aot/test_h100.py tests/aot/test_norms.py tests/aot/test_plan.py \
		-k "not sampler_fits and not v6e" -m "not heavy" $(ARGS)

lint: $(VENV)/.test  ## run ruff, the import contracts and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.test  ## time the sampler and diffusers on this machine; write docs/results/benchmarks/
	$(BIN)/python -m helios_jax.benchmarks.throughput $(ARGS)

gpu-report: $(VENV)/.test  ## measure all figures of this machine's GPU in nine minutes; write docs/results/benchmarks/
	$(BIN)/python -m helios_jax.benchmarks.gpu_report $(ARGS)

fuzz: export FUZZ_COUNTS := $(abspath $(VENV))/fuzz.jsonl
fuzz: $(VENV)/.test  ## try 1,000 odd inputs and 100 signals; write docs/reliability.md
	rm -f $(FUZZ_COUNTS)
	$(BIN)/python -m pytest -n 2 -q tests/fuzz --hypothesis-seed=0 $(ARGS); result=$$?; \
	$(BIN)/python -m tests.fuzz.report $(FUZZ_COUNTS) docs/reliability.md && exit $$result

check-kernels: $(VENV)/.run  ## compare the kernels' values and gradients with their references on this GPU or TPU
	$(BIN)/python -m pallas_kernels.tools.check $(ARGS)

tune: $(VENV)/.run  ## time a kernel's block sizes on this GPU or TPU: make tune ARGS="attention --write"
	$(BIN)/python -m pallas_kernels.tools.tune $(ARGS)

parity: $(VENV)/.test  ## measure the error against the references; write docs/results/parity.md
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(BIN)/python -m tests.parity.report docs/results/parity.md

# --- the toy: everything up to the embedded models ---
DATA := data/toy
LATENTS := data/toy-latents
TOY := helios_jax/assets/toy

# A stopped run ends make; the same command continues from the checkpoint.
run = $(BIN)/python train.py configs/toy/$(1).yaml $(2) $(ARGS)
# ODE pairs of the teacher $(1), for students of one step per level, in the folder $(2).
pairs = $(BIN)/python -m helios_jax.toy.build --captions --videos 256 --out $(2)-captions.txt && \
	$(BIN)/python -m helios_jax.precompute ode --prompts $(2)-captions.txt --model $(1) --out $(2) --size 64x64 \
	--num-frames 132 --steps 20 20 20 --student-steps 1 1 1 --guidance-scale 3 --negative-prompt "" \
	--time-shift-type exponential --batch 32 --shard-size 64

toy: toy-data toy-vae toy-latents toy-stage1 toy-mid toy-distilled toy-score
toy-data: $(VENV)/.run
	test -d $(DATA) || $(BIN)/python -m helios_jax.toy.build --out $(DATA) --videos 1800 --chunks 4
toy-vae: $(VENV)/.run
	$(call run,vae)
	$(call run,vae_long)
	cp -r runs/toy-vae-long/vae $(TOY)/
toy-latents: $(VENV)/.run
	test -d $(LATENTS) || $(BIN)/python -m helios_jax.precompute --videos $(DATA) --vae $(TOY)/vae --text $(TOY) --out $(LATENTS)
toy-stage1: $(VENV)/.run
	$(call run,stage1)
	cp -r runs/toy-stage1/pipeline/transformer $(TOY)/
toy-mid: $(VENV)/.run
	$(call run,stage2_init,run=runs/toy-mid init=$(TOY))
	rm -rf $(TOY)_mid && cp -r runs/toy-mid/pipeline $(TOY)_mid
# Without the discriminator, which brings nothing here (docs/ablations.md) and takes more than twice as long.
toy-distilled: $(VENV)/.run
	test -f runs/toy-pairs/dataset_info.json || { $(call pairs,$(TOY)_mid,runs/toy-pairs); }
	$(call run,stage3_ode,run=runs/toy-ode init=$(TOY)_mid data.folder=runs/toy-pairs)
	$(call run,stage3_distill,run=runs/toy-distilled init=runs/toy-ode/pipeline distill.score.init=$(TOY) \
		distill.gan=null 'trainable=[adapters]')
	rm -rf $(TOY)_distilled && cp -r runs/toy-distilled/pipeline $(TOY)_distilled
toy-score: $(VENV)/.run  ## score the embedded models on held-out captions
	$(BIN)/python -m helios_jax.toy.report --out docs/results/toy.md $(ARGS)

# --- the toy's three stages, as at 14B; `make chain` continues where it was stopped ---
CHAIN := runs/toy-chain
done = $(CHAIN)/$(1)/pipeline/model_index.json
# The export's index is the last file of a stage.
train = $(BIN)/python train.py configs/$(1).yaml $(ARGS)

chain: $(CHAIN)/report.md  ## run all stages of the toy and write a report
$(CHAIN)/report.md: $(call done,stage3_distill) | $(VENV)/.test-light
	$(BIN)/python -m helios_jax.toy.chain_report --chain $(CHAIN) --out $@
$(call done,stage3_distill): $(call done,stage3_ode)
	$(call train,toy/stage3_distill)
$(call done,stage3_ode): $(CHAIN)/ode.done
	$(call train,toy/stage3_ode)
$(CHAIN)/ode.done: $(call done,stage2_post)
	$(call pairs,$(CHAIN)/stage2_post/pipeline,$(CHAIN)/ode)
	touch $@
$(call done,stage2_post): $(call done,stage2_init)
	$(call train,toy/stage2_post)
$(call done,stage2_init): $(call done,stage1_post)
	$(call train,toy/stage2_init)
$(call done,stage1_post): $(call done,stage1_init)
	$(call train,toy/stage1_post)
$(call done,stage1_init): $(CHAIN)/wan/transformer/config.json | toy-data toy-latents
	$(call train,toy/stage1_init)
$(CHAIN)/wan/transformer/config.json: | $(VENV)/.run
	$(BIN)/python -m helios_jax.toy.wan --model $(TOY) --out $(CHAIN)/wan

# --- the larger toy world, from its videos to a student of one step per level; continues where it was stopped ---
SCENES := helios_jax/assets/scenes
made = runs/scenes-$(1)/pipeline/model_index.json

scenes: $(call made,stage3-distill)  ## train models of the larger toy world: some hours on two cores
$(call made,stage3-distill): $(call made,stage3-ode) $(call made,stage1)
	$(call train,scenes/stage3_distill)
$(call made,stage1): $(call made,stage2-post)
	$(call train,scenes/stage1)
$(call made,stage3-ode): runs/scenes-ode.done
	$(call train,scenes/stage3_ode)
runs/scenes-ode.done: $(call made,stage2-post)
	$(BIN)/python -m helios_jax.toy.build --world scenes --captions --videos 256 --out runs/scenes-captions.txt
	$(BIN)/python -m helios_jax.precompute ode --prompts runs/scenes-captions.txt --model runs/scenes-stage2-post/pipeline \
		--out runs/scenes-ode --size 128x128 --num-frames 132 --steps 10 10 10 --student-steps 1 1 1 --guidance-scale 3 \
		--negative-prompt "" --time-shift-type exponential --batch 16 --shard-size 64
	touch $@
$(call made,stage2-post): $(call made,stage2-init)
	$(call train,scenes/stage2_post)
$(call made,stage2-init): data/scenes-latents/dataset_info.json
	$(call train,scenes/stage2_init)
data/scenes-latents/dataset_info.json: | data/scenes/dataset_info.json $(SCENES)/vae/config.json
	$(BIN)/python -m helios_jax.precompute --videos data/scenes --vae $(SCENES)/vae --text $(SCENES) --out data/scenes-latents
$(SCENES)/vae/config.json: | data/scenes/dataset_info.json
	$(BIN)/python train.py configs/scenes/vae.yaml $(ARGS)
	$(BIN)/python train.py configs/scenes/vae_long.yaml $(ARGS)
	cp -r runs/scenes-vae-long/vae $(SCENES)/
data/scenes/dataset_info.json: | $(VENV)/.run
	rm -rf data/scenes
	$(BIN)/python -m helios_jax.toy.build --world scenes --out data/scenes --videos 1500 --chunks 4

lock: $(VENV)/.test  ## write requirements*.txt from pyproject.toml
	$(BIN)/uv pip compile pyproject.toml --universal --python-version 3.11 --no-header -q -o requirements.txt
	$(BIN)/uv pip compile pyproject.toml --universal --python-version 3.11 --no-header -q \
		--extra test --extra reference --extra ray --extra heliosbench -c requirements.txt -o requirements-test.txt

clean:
	rm -rf $(VENV) $(AOT) $(AOT)-newest .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Python compiles what is imported, a fraction of what is installed. (0 is yes to pip here, as for all that is "no-".)
$(VENV)/.run: export PIP_NO_COMPILE := 0
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
