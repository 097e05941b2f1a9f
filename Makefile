# make demo    environment, install, classify the sample photos, offline
# make test    environment, install with the test references, the whole test suite
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint types setup clean

demo: .venv/.run
	HF_HUB_OFFLINE=1 $(BIN)/opsin classify examples/photos --top-k 3

test: .venv/.dev .venv/.browser
	$(BIN)/python -m pytest

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.dev
	$(BIN)/mypy

setup: .venv/.dev

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.run: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

.venv/.dev: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@ .venv/.run

# for the tests of the server's page, where Debian's packages can be had; elsewhere they are skipped, and say so
.venv/.browser: | .venv/bin/python
	command -v chromium > /dev/null || (test "$$(id -u)" = 0 && export DEBIAN_FRONTEND=noninteractive && \
		apt-get -qq update && apt-get -qq install --no-install-recommends -y chromium > /dev/null) || \
		echo "no Chromium: the tests of the page will be skipped"
	touch $@

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
