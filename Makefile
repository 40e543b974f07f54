# Both targets set up what they need in .venv, from nothing but Python (>= 3.11) and make.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint clean

demo: .venv/demo
	$(BIN)/darex demo

test: .venv/test lint
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/demo: pyproject.toml requirements/demo.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -e '.[all]'
	$(BIN)/python -m pip install -q --no-deps -r requirements/demo.txt
	touch $@

.venv/test: .venv/demo
	$(BIN)/python -m pip install -q -e '.[all,test]'
	touch $@

clean:
	rm -rf .venv
