PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
ROOMS := kvstore eviction engine_adapter ring_attention

.DEFAULT_GOAL := help
.PHONY: help setup demo test check format links clean soak bench-reattach bench-store bench-ring bench-hints bench-eviction bench-lmcache-env

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

# In an environment of its own: it pins packages that Holdfast uses at other versions.
LMCACHE := benchmarks/.venv-lmcache
bench-lmcache-env: ## Make LMCache's environment, for its rows of bench-store
	test -x $(LMCACHE)/bin/python || $(PYTHON) -m venv $(LMCACHE)
	$(LMCACHE)/bin/python -m pip install --disable-pip-version-check -c constraints.txt torch
	$(LMCACHE)/bin/python -m pip install --disable-pip-version-check --no-deps -r benchmarks/lmcache-requirements.txt
	$(LMCACHE)/bin/python -c 'import lmcache.v1.storage_backend.storage_manager'

format: $(STAMP) ## Format the code and fix what can be fixed safely
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean: ## Remove what was generated, except .venv
	rm -rf .links .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist holdfast.egg-info
	find holdfast $(ROOMS) tests -name __pycache__ -type d -prune -exec rm -rf {} +
