# Every target does its own set-up: a bare machine needs Python 3.11 or newer, pip and make.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test lint docs docs-serve wheel-test clean
.DEFAULT_GOAL := demo

# torch first and pinned: whatever else asks for torch then finds it there, and pulls no other build. The rest comes by
# uv in a fifth of pip's time, or by pip where uv cannot (it does not read pip's own settings of indexes and proxies).
WHENCE := -c constraints.txt -e '.[dev,docs]'
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0 uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python $(WHENCE) || \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(WHENCE)
	touch $(READY)

demo: $(READY)  ## Train a small model on Python's docstrings and ask what taught it each answer
	$(BIN)/whence demo

# A process for each core, with one thread in each: on two cores half the time of two threads in one process. Files go
# in their own order, not by their number of tests: those of few and long ones would come last, and one core would wait.
test: $(READY)  ## Run the tests and the doctests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

lint: $(READY)  ## Style, types, and which module may import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

docs: $(READY)  ## Build the site into site/; a warning is an error
	$(BIN)/python docs/make_site.py
	$(BIN)/zensical build --clean --strict

docs-serve: $(READY)  ## Show the site at http://localhost:8000; run it again after a page has changed
	$(BIN)/python docs/make_site.py
	$(BIN)/zensical serve

wheel-test: $(READY)  ## Build the wheel, and use it from an environment of its own
	OMP_NUM_THREADS=1 $(BIN)/python .ci/wheel_test.py

clean:
	rm -rf .venv build site whence-demo
