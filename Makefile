# All targets set up what they need, in .venv or beside it, from nothing but Python (>= 3.11) and make.
PYTHON ?= python3
BIN := .venv/bin
OLDEST := .venv-oldest

.PHONY: demo test docs check-report test-oldest test-gpu lint clean

demo: .venv/demo
	$(BIN)/darex demo

# Each worker takes one half of the files in their order, so that fixtures of a module are seldom made twice.
test: .venv/test lint
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# The pages of docs/ and the reference of the public names, into build/site.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Pages of `darex report` in a browser: three widths, light and dark, paper, axe-core's rules of accessibility.
check-report:
ifeq ($(and $(shell command -v chromium),$(shell command -v chromedriver),$(shell command -v npm)),)
	@echo "check-report is skipped: it takes chromium, chromedriver and npm (Debian: chromium, chromium-driver, npm)"
else
	$(MAKE) .venv/test
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/browser.py
endif

# The quick tests with the oldest packages that pyproject.toml takes.
test-oldest: $(OLDEST)/ready
	HF_HUB_OFFLINE=1 $(OLDEST)/bin/python -m pytest -n 2 --dist worksteal --oldest $(addprefix tests/test_,$(addsuffix .py,$(QUICK)))

QUICK := adamr artifact calibration delta dtypes format1 format2 hostile mask orbax outputs parts remote scope \
	stream structure table tasks train

# On a machine with a GPU: golden digests, parity and generation there, then speed against the card's bandwidth.
test-gpu:
ifeq ($(shell command -v nvidia-smi),)
	@echo "test-gpu is skipped: this machine has no NVIDIA GPU (no nvidia-smi)"
else
	$(MAKE) .venv/test
	$(BIN)/python -m pip install -q -e '.[cuda12]'
	HF_HUB_OFFLINE=1 JAX_PLATFORMS=cuda,cpu $(BIN)/python -m pytest tests/gpu.py
	$(BIN)/python benchmarks/gpu.py --out benchmarks/results/gpu.json
endif

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/demo: pyproject.toml requirements/demo.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -e '.[all]'
	$(BIN)/python -m pip install -q --no-deps -r requirements/demo.txt
	touch $@

.venv/docs: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -e '.[docs]'
	touch $@

.venv/test: .venv/demo
	$(BIN)/python -m pip install -q -e '.[all,test]'
	touch $@

$(OLDEST)/ready: pyproject.toml tests/oldest.py
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(PYTHON) tests/oldest.py > $(OLDEST)/requirements.txt
	$(OLDEST)/bin/python -m pip install -q -r $(OLDEST)/requirements.txt -e . pytest pytest-xdist hypothesis
	touch $@

clean:
	rm -rf .venv $(OLDEST)
