PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
ROOMS := kvstore eviction engine_adapter ring_attention
ENGINES := vllm lmcache

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-engines engines check format links clean soak bench-reattach bench-store bench-ring bench-hints bench-eviction bench-adapters

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## Create .venv and install holdfast with its pinned dependencies

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[runner,dev]'
	touch $@

demo: $(STAMP) ## Run the demonstration
	$(BIN)/holdfast demo

test: $(STAMP) ## Run all tests
	$(BIN)/python -m pytest -q

test-engines: engines ## Run the tests against real engines, each in its environment
	HOLDFAST_LMCACHE_PYTHON=$(CURDIR)/.venv-lmcache/bin/python .venv-vllm/bin/python -m pytest -q tests/engines/vllm
	HOLDFAST_VLLM_PYTHON=$(CURDIR)/.venv-vllm/bin/python .venv-lmcache/bin/python -m pytest -q tests/engines/lmcache
	PYTHONPATH=$(CURDIR)/.sglang$${PYTHONPATH:+:$$PYTHONPATH} .venv-lmcache/bin/python -m pytest -q tests/engines/sglang

soak: $(STAMP) ## Kill a daemon at random for MINUTES (20), from SEED if given, and hold it against a model
	PYTHONPATH=tests $(BIN)/python tests/crash_harness.py --minutes $(or $(MINUTES),20) $(if $(SEED),--seed $(SEED))

check: $(STAMP) links ## Lint, formatting, types, layering, packaging
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	cd .links && ../$(BIN)/mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache -p holdfast
	$(BIN)/python -m pytest -q tests/test_layering.py tests/test_packaging.py

# mypy does not see setuptools' package-dir mapping, so it reads the package through symlinks.
links:
	@rm -rf .links && mkdir -p .links/holdfast
	@for path in holdfast/*; do ln -s ../../$$path .links/holdfast/; done
	@for room in $(ROOMS); do ln -s ../../$$room .links/holdfast/; done

bench-reattach: $(STAMP) ## Measure a reattach against the bare operations (benchmarks/results/reattach.json)
	$(BIN)/python benchmarks/reattach.py

bench-store: $(STAMP) ## Measure the store against the bare operations (benchmarks/results/store.json)
	$(BIN)/python benchmarks/store.py

bench-ring: $(STAMP) ## Measure ring attention against dense (benchmarks/results/ring.json)
	$(BIN)/python benchmarks/ring.py

bench-eviction: $(STAMP) ## Replay traces with every eviction policy (benchmarks/results/eviction.json)
	$(BIN)/python benchmarks/eviction.py

bench-hints: $(STAMP) ## Measure what queries wait for KV, with hints and without (benchmarks/results/hints.json)
	$(BIN)/python benchmarks/hints.py

bench-adapters: $(STAMP) ## Measure first tokens in vLLM by where KV comes from; wants `make engines` (benchmarks/results/adapters.json)
	$(BIN)/python benchmarks/adapters.py

engines: $(ENGINES:%=.venv-%/.holdfast) .sglang/.stamp ## Make the environments of real engines (.venv-vllm, .venv-lmcache, .sglang)

# Environments of their own: engines pin packages that Holdfast uses at other versions. Dropped pins must go: made anew.
$(ENGINES:%=.venv-%/.stamp): .venv-%/.stamp: deploy/engines/%.txt
	$(PYTHON) -m venv --clear .venv-$*
	.venv-$*/bin/python -m pip install --disable-pip-version-check --quiet --no-deps -r $<
	touch $@

$(ENGINES:%=.venv-%/.holdfast): .venv-%/.holdfast: .venv-%/.stamp pyproject.toml
	.venv-$*/bin/python -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation -e .
	touch $@

.sglang/.stamp: deploy/engines/sglang.txt
	rm -rf .sglang
	$(PYTHON) -m pip install --disable-pip-version-check --quiet --no-deps --no-compile --target .sglang -r $<
	touch $@

format: $(STAMP) ## Format the code and fix what can be fixed safely
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean: ## Remove what was generated, except .venv
	rm -rf .links .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist holdfast.egg-info
	find holdfast $(ROOMS) tests -name __pycache__ -type d -prune -exec rm -rf {} +
