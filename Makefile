# The two commands of the README, and what they need. Everything goes into .venv and .propensity.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
STAMP := $(VENV)/.installed
CAMPAIGN ?= ecommerce_purchase
PORT ?= 3001
SERVING_PORT ?= 3000

.PHONY: demo serve test dev benchmark benchmark-real benchmark-serving notebooks clean

demo: $(STAMP)
	@$(VENV)/bin/propensity demo $(CAMPAIGN)

serve: $(STAMP)
	@$(VENV)/bin/propensity serve --port $(SERVING_PORT)

dev: $(STAMP)
	@$(VENV)/bin/propensity dev --port $(PORT)

test: $(STAMP)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright
	$(VENV)/bin/pytest -n 2 --dist loadfile --no-loadscope-reorder

benchmark: $(STAMP)
	$(VENV)/bin/python -m benchmarks.run

benchmark-real: $(STAMP)
	$(VENV)/bin/python -m benchmarks.real

benchmark-serving: $(STAMP)
	$(VENV)/bin/python -m benchmarks.serving

notebooks: $(STAMP)
	$(VENV)/bin/python notebooks/render.py $(CAMPAIGN)

clean:
	rm -rf $(VENV) .propensity .pytest_cache .ruff_cache .hypothesis *.egg-info

# Every version is pinned in constraints.txt; nothing is installed outside the virtual environment.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
		{ echo "error: Python 3.11 is needed, got '$(PYTHON)'; set PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@
