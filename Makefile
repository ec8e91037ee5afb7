# nft_ray: the commands. `make` lists them.
PYTHON ?= python3
# where torch comes from; for CUDA: make setup TORCH="--index-url https://download.pytorch.org/whl/cu130"
TORCH ?=
ARGS ?=
SOAK_MINUTES ?= 30
SOAK_OUTPUT ?= benchmarks/results/soak
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
export OMP_NUM_THREADS ?= 1

define KNOWN
import json, urllib.request
assert json.load(urllib.request.urlopen("https://pypi.org/pypi/requests/2.31.0/json", timeout=5))["vulnerabilities"]
endef
export KNOWN

.PHONY: help setup quickstart test test-all chaos soak kill-loop check audit docker-check clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: .venv/.complete ## .venv with everything (a few minutes, once)

.venv/.complete: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	@echo "installing into .venv: about 3 minutes"
	$(PIP) $(TORCH) torch
	$(PIP) --editable '.[dev]'
	@touch $@

quickstart: setup ## nano-sd3 learns GenEval's prompts through the whole system (2 cores, minutes)
	$(BIN)/nft-ray train configs/quickstart.yaml $(ARGS)

.PHONY: oracles
oracles: setup # the environments that cannot share .venv: open_clip, and published code to compare with
	$(BIN)/python tests/oracles/make_env.py openclip hpsv2x imagereward

test: setup ## what must hold before a change lands, up to 18 minutes (tests/README.md; plain `pytest` leaves out the slow ones)
	$(BIN)/python -m pytest -m "not large and not full" -W ignore $(ARGS)

test-all: oracles ## and what is at real size or needs an oracle's environment
	$(BIN)/python -m pytest -m "not full" -W ignore $(ARGS)

chaos: setup ## everything that can die under a run does (long); the table is benchmarks/results/chaos.md
	CHAOS_TABLE=benchmarks/results/chaos.md $(BIN)/python -m pytest -n 2 -m chaos -W ignore tests/chaos $(ARGS)

soak: setup ## 900 tiny epochs, again and again, under random kills; SOAK_MINUTES=30 says for how long
	$(BIN)/python -m tests.chaos.soak --minutes $(SOAK_MINUTES) --output $(SOAK_OUTPUT) $(ARGS)

kill-loop: setup ## the quickstart, its driver killed every minute or two, until it is finished (ARGS=--joined: on one cluster)
	$(BIN)/python -m tests.chaos.kill_loop $(ARGS)

check: setup ## style, format, types, length, who imports whom (the contracts in pyproject.toml)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache
	@git ls-files -co --exclude-standard '*.py' | xargs wc -l | \
		awk '$$2 != "total" && $$1 > 400 { print $$2 ": " $$1 " lines, at most 400: split it by nouns"; long = 1 } END { exit long }'

	@$(MAKE) --no-print-directory audit

audit: setup ## the versions of constraints.txt against the published advisories, where they can be reached
	@if $(BIN)/python -c "$$KNOWN" 2>/dev/null; \
	then $(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip --progress-spinner off; \
	else echo "audit: skipped, the advisories of pypi.org cannot be reached from here"; fi

docker-check: ## the image's install steps in a clean root, without Docker (needs root and debootstrap)
	docker/check.sh

clean: ## remove .venv and caches; runs/ stays
	rm -rf .venv .envs .pytest_cache .mypy_cache .ruff_cache *.egg-info
