# `make demo` and `make test` do all the set-up on a machine that has Python (>= 3.11) and make.
# The environment is reused until pyproject.toml or constraints.txt changes.

PYTHON ?= python3
VENV   ?= .venv
OUT    ?= demo-out
SEED   ?= 0

BIN := $(VENV)/bin

.PHONY: demo test coverage fuzz soak check format docs model dist clean

demo: $(VENV)/installed
	$(BIN)/loragen demo --output $(OUT) --seed $(SEED) --force

TEST := $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test: check model
	$(TEST)

# Not in `test`: counting lines takes two thirds of the tests' own time once more.
coverage: model
	$(TEST) --cov

# Random and damaged files into every command that reads one, N in all. What fails is kept in
# fuzz-failures/.
N ?= 10000
fuzz: $(VENV)/installed
	FUZZ=$(N) $(BIN)/python -m pytest tests/faults/test_fuzz.py -n auto --timeout 0

# Each training killed KILLS times at random moments, and on full disks (as root): hours.
KILLS ?= 100
soak: $(VENV)/installed
	SOAK=$(KILLS) $(BIN)/python -m pytest tests/faults/test_soak.py -s

# A real model for the tests on one, fetched once; without it they are skipped.
model: $(VENV)/installed
	@$(BIN)/python examples/real-tasks/fetch_model.py || echo "The tests on a real model are skipped."

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/installed
	$(BIN)/python docs/generate.py
	$(SITE)
	$(SITE) -f mkdocs.zh.yml -d site/zh

# Without the theme's notice of its successor.
SITE := NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

dist: $(VENV)/installed
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) $(OUT) build dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis fuzz-failures

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e ".[dev,offline]" -c constraints.txt
	@touch $@
