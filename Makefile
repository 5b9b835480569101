# One word a job; README.md lists them. PYTHON is any Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# Development tools are only installed for the jobs that need them; torch comes first and alone, so that an index which offers its
# small CPU build is asked before anything else pulls the large one in.
RUN := $(VENV)/.run-stamp
DEV := $(VENV)/.dev-stamp
LOCK := pyproject.toml constraints.txt
PARALLEL := -n 2 --dist loadgroup --no-loadscope-reorder

.PHONY: install up down status test test-slow check lint fmt bench-engine bench-peers bench-step bench-first-token bench-speculation bench-goodput bench-priority bench-prefix bench-long-context bench-flatness bench-step-profile bench-lora soak fuzz ledger-kills gateway-kills slow-streams bench-structured bench-sampling bench-stages bench-quantization bench-tools bench-embeddings bench-life bench-gateway bench-gpu clean help
.DEFAULT_GOAL := help

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

install: $(RUN)  ## what running needs, nothing is started

up: $(RUN)  ## install and start the platform, with a model that answers
	@$(BIN)/mmaas up

down: $(RUN)  ## end every process of the platform
	@$(BIN)/mmaas down

status: $(RUN)  ## what runs and what is served
	@$(BIN)/mmaas status

test: $(DEV)  ## all tests but the slow ones
	$(BIN)/python -m pytest -m "not slow" $(PARALLEL)

test-slow: $(DEV)  ## the slow ones: every family, real training, two nodes, other people's clients
	$(BIN)/python -m pytest -m slow $(PARALLEL)

check: lint  ## what must hold before anything is merged
	$(BIN)/python -m mypy
	$(BIN)/python -m pytest -q tests/test_layers.py

lint: $(DEV)  ## style of the code, nothing is changed
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

fmt: $(DEV)  ## put the code into our style
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

bench-engine: $(DEV)  ## output tokens per second beside the peers that are installed
	$(BIN)/python -m bench.engine

bench-peers:  ## install vLLM and OpenVINO GenAI, each into a virtual environment of its own
	bench/peers/install.sh

bench-step: $(DEV)  ## what a step of the engine costs outside the model
	$(BIN)/python -m bench.step

bench-first-token: $(DEV)  ## what HTTP adds to the time to the first token
	$(BIN)/python -m bench.first_token

bench-speculation: $(DEV)  ## what guessing tokens by prompt lookup brings, and costs
	$(BIN)/python -m bench.speculation

bench-goodput: $(DEV)  ## requests answered in good time under a real load, beside vllm serve
	$(BIN)/python -m bench.goodput

bench-priority: $(DEV)  ## what it brings that gateways step back behind ranks (root)
	$(BIN)/python -m bench.priority

bench-prefix: $(DEV)  ## what the prefix cache gains where prompts begin alike
	$(BIN)/python -m bench.prefix

bench-long-context: $(DEV)  ## speed and memory as the context grows to 8,192 tokens
	$(BIN)/python -m bench.long_context

bench-flatness: $(DEV)  ## time between tokens while a long prompt enters
	$(BIN)/python -m bench.flatness

bench-structured: $(DEV)  ## what holding answers to a schema costs
	$(BIN)/python -m bench.structured

bench-sampling: $(DEV)  ## what each way to choose tokens costs
	$(BIN)/python -m bench.sampling

bench-step-profile: $(DEV)  ## where the time of a decode step goes
	$(BIN)/python -m bench.step_profile

bench-lora: $(DEV)  ## what LoRA adapters cost, by their number
	$(BIN)/python -m bench.lora
	$(BIN)/python -m bench.lora --model M

bench-stages: $(DEV)  ## two pipeline stages beside two tensor parts
	$(BIN)/python -m bench.stages

bench-quantization: $(DEV)  ## what weights in eight bits cost and bring
	$(BIN)/python -m bench.quantization

bench-tools: $(DEV)  ## what finding tool calls costs a token
	$(BIN)/python -m bench.tools

bench-embeddings: $(DEV)  ## rows per second of embeddings beside sentence-transformers
	$(BIN)/python -m bench.embeddings

bench-life: $(DEV)  ## what safety costs; how quickly a model sleeps, wakes and takes other weights
	$(BIN)/python -m bench.life

bench-gateway: $(DEV)  ## what our gateway adds to a request, beside LiteLLM's proxy (bench/peers/install.sh litellm)
	$(BIN)/python -m bench.gateway

bench-gpu: $(DEV)  ## one GPU's tokens a second beside its own limits
	$(BIN)/python -m bench.gpu

soak: $(DEV)  ## 20,000 requests of every kind; nothing may be left of them
	$(BIN)/python -m bench.soak

fuzz: $(DEV)  ## 200 right and 200 wrong requests to every operation, walks, 300 strings and all foreign ids everywhere
	FUZZ_EXAMPLES=200 $(BIN)/python -m pytest tests/deployments/gateway/test_document.py tests/deployments/gateway/test_hostile_strings.py tests/deployments/gateway/test_isolation.py

ledger-kills: $(DEV)  ## about a thousand kills of the ledger's writer, nothing may be lost or doubled
	$(BIN)/python -m bench.ledger_kills

gateway-kills: $(DEV)  ## 200 kills of a gateway under load, nothing may be lost or doubled
	$(BIN)/python -m bench.gateway_kills

slow-streams: $(DEV)  ## 500 slow streams at once for ten minutes, none may break
	$(BIN)/python -m bench.slow_streams

clean:  ## remove caches and the virtual environment; data in .mmaas stays
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV): $(DEV)  ## the virtual environment with everything in it

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; try: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade pip

$(RUN): $(LOCK) | $(BIN)/python
	$(PIP) install torch==2.13.0
	$(PIP) install -c constraints.txt -e .
	@touch $@

$(DEV): $(RUN)
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@
