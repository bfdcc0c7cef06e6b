# The main commands: `make extract TRAIT=uncertainty_calibration`, `make test`, `make check`.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TRAIT ?= uncertainty_calibration

# the folder of a run below experiments/: named after the model if one is given, by the last part of its name or path
model_name = $(shell printf '%s\n' '$(subst ','\'',$(MODEL))' | sed -e 's|/*$$||' -e 's|.*/||' -e 's|\.gguf$$||' \
  | tr 'A-Z' 'a-z' | tr -c 'a-z0-9._\n-' '_' | sed 's|^[^a-z0-9]*||' | cut -c -64 | sed 's|[._-]*$$||')
EXPERIMENT ?= $(if $(filter-out pocket,$(MODEL)),$(or $(model_name),model),pocket)

# installs the extras of a target once, and again when setup.cfg or constraints.txt change
$(VENV)/.installed-%: setup.cfg pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (once)..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e $(if $(filter core,$*),.,".[$*]")
	@touch $@

.PHONY: extract serve test test-all check bench clean

extract: $(VENV)/.installed-report,lora
	@$(BIN)/traitline extract --experiment "$(EXPERIMENT)" --traits "$(TRAIT)" \
	  $(if $(MODEL),--model "$(MODEL)") $(if $(BATCH_SIZE),--batch-size "$(BATCH_SIZE)") \
	  $(if $(N_EXAMPLES),--n-examples "$(N_EXAMPLES)") $(if $(LAYERS),--layers "$(LAYERS)") $(ARGS)

serve: $(VENV)/.installed-serve
	@exec $(BIN)/traitline serve $(if $(AFTER),--after "$(AFTER)") $(if $(BEFORE),--before "$(BEFORE)") \
	  $(if $(MODEL),--model "$(MODEL)") $(if $(DRAFT),--draft "$(DRAFT)") $(if $(PORT),--port "$(PORT)") \
	  $(if $(BATCH_SIZE),--batch-size "$(BATCH_SIZE)") $(ARGS)

# a file to a worker, since its tests share models and runs; in the order of tests/conftest.py, the longest first
XDIST := -n 2 --dist loadfile --no-loadscope-reorder

test: $(VENV)/.installed-test
	@$(BIN)/python -m pytest $(XDIST) $(ARGS)

test-all: $(VENV)/.installed-test
	@$(BIN)/python -m pytest $(XDIST) -m "" $(ARGS)

check: $(VENV)/.installed-test $(VENV)/.installed-check
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache

bench: $(VENV)/.installed-bench
	@$(BIN)/python -m benchmarks $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
