# The commands of the project; `make` lists them. Everything runs in .venv, which the first of them makes.
SHELL := /bin/bash
.DEFAULT_GOAL := help
BIN := .venv/bin
STAMP := .venv/.complete

# make demo SOURCE=rocov2 ROOT=path/to/data SET="train.steps=100 codebook.steps=50" NAME=short
SOURCE ?=
ROOT ?=
SET ?=
NAME ?=
MODEL ?= models:/fuselip-sample-tiny@champion
PORT ?=
# Handed over by the environment, which neither make nor the shell reads: spaces, quotes and dollars arrive whole.
export GIVEN_SOURCE = $(value SOURCE)
export GIVEN_ROOT = $(value ROOT)
export GIVEN_SET = $(value SET)
export GIVEN_NAME = $(value NAME)
export GIVEN_MODEL = $(value MODEL)
export GIVEN_PORT = $(value PORT)
TESTS ?= tests

# Nothing here reports to anyone; flows/environment.py says the same to processes started otherwise.
export DO_NOT_TRACK := true
# Every stage is a process of its own: without compiled files in .venv each would compile torch's again, for 15 s.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo test test-long test-docker lint format docs workflows audit serve-flows serve-ui serve-model clean

help: ## List the commands
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP) ## Make .venv from requirements.lock, fully pinned and hashed

# Programs in an environment name its place, so one that was copied or moved with the checkout is made anew.
PLACE := $(CURDIR)
export PLACE
ifneq "$(shell cat $(STAMP) 2>/dev/null)" "$(PLACE)"
.PHONY: $(STAMP)
endif

$(STAMP): requirements.lock pyproject.toml .ci/find-uv
	@set -e; if [ -e $(BIN) ] && [ "$$(cat $@ 2>/dev/null)" != "$$PLACE" ]; then \
	  echo "removing .venv: it is incomplete, or was made for another folder than $$PLACE"; rm -rf .venv; fi; \
	uv=$$(.ci/find-uv); echo "setting up .venv from requirements.lock (some GB, once)"; \
	[ -x $(BIN)/python ] || "$$uv" venv --quiet --python 3.11 .venv; \
	"$$uv" pip sync --quiet --python $(BIN)/python --require-hashes requirements.lock; \
	"$$uv" pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .; \
	printf %s "$$PLACE" > $@

demo: setup ## Run the main job on the embedded sample, or on SOURCE and ROOT
	@$(BIN)/python -m flows.pipeline $${GIVEN_SOURCE:+--source "$$GIVEN_SOURCE"} $${GIVEN_ROOT:+--root "$$GIVEN_ROOT"} \
	  $${GIVEN_NAME:+--name "$$GIVEN_NAME"} $${GIVEN_SET:+--set "$$GIVEN_SET"}

test: setup ## Run the tests (all but the long ones)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=20 -m "not long" $(TESTS)

test-long: setup ## Run the tests that take minutes
	@$(BIN)/python -m pytest -m long $(TESTS)

test-docker: setup ## Build the images and run them; needs a Docker Engine
	@$(BIN)/python -m pytest tests/test_docker.py tests/test_docker_mounts.py tests/test_docker_flow.py \
	  tests/test_docker_pool.py tests/test_container_runner.py tests/test_container.py tests/test_compose.py \
	  tests/test_compose_whole.py

lint: setup ## Check style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: setup ## Mend style where that can be done automatically
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: setup ## Build the documentation site into site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

workflows: ## Check .github with actionlint and zizmor; needs node
	@.ci/check-workflows

audit: ## Look up known vulnerabilities of the locked packages
	@.ci/audit

serve-flows: setup ## Serve flows on this machine: Prefect's server, UI and worker, and MLflow's page
	@$(BIN)/python -m flows.server.serve

serve-ui: setup ## Show curves and models on http://127.0.0.1:5000, or on PORT
	@$(BIN)/python -m flows.server.mlflow_pages ui $${GIVEN_PORT:+--port "$$GIVEN_PORT"}

serve-model: setup ## Serve the registered MODEL on http://127.0.0.1:5001, or on PORT
	@$(BIN)/python -m flows.server.mlflow_pages model "$$GIVEN_MODEL" $${GIVEN_PORT:+--port "$$GIVEN_PORT"}

clean: ## Remove outputs and local stores; data, caches and .venv stay
	rm -rf artifacts runs .prefect mlflow/mlflow.db mlflow/artifacts
