# planc: two commands for a newcomer, `make demo` and `make test`; the rest is for those who work on it.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
DEMO   ?= out/llama-3.1-70b-8xh200

.PHONY: demo test test-slow test-engines lint format examples readme check-readme clean help
.DEFAULT_GOAL := help

help:
	@echo "make demo          compile Llama-3.1-70B on eight H200s to a serving plan"
	@echo "make test          the test suite"
	@echo "make test-slow     every catalogue model at full depth"
	@echo "make test-engines  serve compiled bundles with a real vLLM (CPU build, own environment)"
	@echo "make test-report   reports in a headless Chromium (Debian, as root: installs it)"
	@echo "make examples      every example request"
	@echo "make readme        run the README's commands and write down what they print"
	@echo "make lint          ruff, mypy --strict, import contracts"

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "planc needs Python 3.11 or newer; try: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) \
	  || { echo "no venv module; on Debian: apt-get install python3-venv"; exit 2; }
	@echo "installing planc and what it needs into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: $(VENV)/.installed
	@$(BIN)/planc compile examples/requests/llama-3.1-70b-8xh200.yaml -o $(DEMO)
	@echo "The bundle lies in $(DEMO); open $(DEMO)/report.html or run: $(BIN)/planc inspect $(DEMO)"

test: $(VENV)/.installed
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile -m "not slow and not engines and not gpu" tests

test-slow: $(VENV)/.installed
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile -m "slow" tests

examples: $(VENV)/.installed
	@BIN=$(abspath $(BIN)) bash examples/run.sh

readme: $(VENV)/.installed
	@$(BIN)/python docs/readme.py

check-readme: $(VENV)/.installed
	@$(BIN)/python docs/readme.py --check

lint: $(VENV)/.installed
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@# the import graph is read from one tree, as the wheel would lay it out
	@rm -rf build/imports && mkdir -p build/imports && cp -rL typings/planc build/imports/
	@cd build/imports && $(abspath $(BIN))/lint-imports --no-cache --config ../../pyproject.toml
	@$(BIN)/mypy

format: $(VENV)/.installed
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .venv-engines out build *.egg-info .pytest_cache .mypy_cache .ruff_cache

-include mk/*.mk
