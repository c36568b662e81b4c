# The commands of this project; `make` lists them.
.DEFAULT_GOAL := help
SHELL := /bin/bash
RECIPE := egs2/librispeech_100_kv/asr1
CONFORMER := conf/train_asr_conformer_mha.yaml conf/train_asr_conformer_mla.yaml
# where the demo works, below the recipe; two trainings side by side, one per core; short profiles
DEMO := --corpus synth --train_nj 2 --inference_nj 2 --nj 2 \
    --datadir demo/data --dumpdir demo/dump --expdir demo/exp --download_dir demo/downloads \
    --profile_args "--lengths '5 30' --repeats 1 --utterances 10"

.PHONY: help env demo demo-all test test-checkout test-gpu lint constraints

help:  ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

env:  ## find or build the Python environment and print its interpreter
	@scripts/environment.sh

demo:  ## run the recipe on the embedded corpus: Conformer with MHA and with MLA, compared
	@python=$$(scripts/environment.sh) && export python && cd $(RECIPE) && \
	    ./run.sh $(DEMO) --asr_config "$(CONFORMER)" $(ARGS)

demo-all:  ## the same for all eight models; resumes where it was stopped
	@python=$$(scripts/environment.sh) && export python && cd $(RECIPE) && \
	    ./run_all.sh $(DEMO) $(ARGS)

# a process of tests per core, at most 8: each of them loads ESPnet
test:  ## run the test suite
	@python=$$(scripts/environment.sh) && \
	    PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" "$$python" -m pytest \
	    --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder $(ARGS)

test-checkout:  ## run the recipe inside the real ESPnet, which is downloaded (some ten minutes)
	@$(MAKE) --no-print-directory test ARGS="tests/checkout -m checkout -rs $(ARGS)"

# ESPNET_KV_TEST_DEVICE=cpu runs the same tests without a GPU
test-gpu:  ## run the tests that need a GPU, where there is one
	@python=$$(scripts/environment.sh) && \
	    export PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" && \
	    export ESPNET_KV_TEST_DEVICE="$${ESPNET_KV_TEST_DEVICE:-cuda}" && \
	    gpus=$$("$$python" -c \
	        'from espnet_kv.recipe.jobs import visible_gpus; print(visible_gpus())') && \
	    if [ "$$ESPNET_KV_TEST_DEVICE" = cuda ] && [ "$$gpus" = 0 ]; then \
	        echo "test-gpu: torch finds no GPU on this machine: nothing was run"; \
	    else "$$python" -m pytest tests/gpu $(ARGS); fi

lint:  ## check style and types
	@python=$$(scripts/environment.sh) && "$$python" -m ruff check . && \
	    "$$python" -m ruff format --check . && "$$python" -m mypy && \
	    MYPYPATH=tests/support "$$python" -m mypy --follow-imports silent tests/checkout

constraints:  ## write constraints.txt: the versions of dependencies in the environment just tested
	@python=$$(scripts/environment.sh) && \
	    versions=$$("$$python" scripts/constraints.py) && echo "$$versions" >constraints.txt
