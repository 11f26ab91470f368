# `make quickstart` and `make test` do everything from a fresh clone; `make help` lists the rest.

PYTHON     ?= python3
VENV       ?= .venv
FLOOR_VENV ?= .venv-floor
EXTRAS     ?= dev
INSTALLER  ?= uv
WORKERS    ?= 2
ARGS       ?=

# PY=<interpreter> uses that interpreter as it is: nothing is created and nothing is installed.
ifdef PY
READY :=
else
PY    := $(VENV)/bin/python
READY := $(VENV)/.convllava-installed
endif

# What the stamp says must be true still: this checkout (the install is editable) and these extras.
comma := ,
STAMP := $(CURDIR) [$(EXTRAS)]
ifneq ($(STAMP),$(shell cat $(VENV)/.convllava-installed 2>/dev/null))
STALE := stale
endif

FLOOR_READY := $(FLOOR_VENV)/.convllava-installed
ifneq ($(STAMP),$(shell cat $(FLOOR_READY) 2>/dev/null))
FLOOR_STALE := stale
endif

# Threads that wait must not spin: on a busy machine that slows torch down several times.
export OMP_WAIT_POLICY ?= PASSIVE
# torch's wheels are large; uv gives up after 30 seconds without this.
export UV_HTTP_TIMEOUT ?= 300

.DEFAULT_GOAL := help
.PHONY: help install quickstart demo test test-slow test-floor docs dist quality style clean stale
.DELETE_ON_ERROR:

help:  ## list the targets and the variables
	@echo "Targets (the first one that needs it creates $(VENV) and installs into it, about 6 GB with torch):"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' $(firstword $(MAKEFILE_LIST)) | awk -F'|' '{printf "%-13s %s\n", $$1, $$2}'
	@echo "Variables:"
	@echo "  PYTHON=python3    the interpreter that new environments are made with (3.11 or newer)"
	@echo "  VENV=.venv        the environment; name an existing one and only what it lacks is installed"
	@echo "  PY=python         an interpreter to use exactly as it is: nothing is created or installed"
	@echo "  INSTALLER=uv      uv, or pip (which reads pip's own configuration of indexes)"
	@echo "  EXTRAS=dev        the extras to install, such as dev,demo"
	@echo "  WORKERS=2         test processes"
	@echo "  ARGS=             passed on to the quickstart or to pytest, such as ARGS='tests/test_layers.py -x'"

install: $(READY)  ## create the environment and install the package into it, editable

quickstart: $(READY)  ## train and test a tiny model from nothing; writes into quickstart/
	$(PY) examples/quickstart/run.py --output quickstart $(ARGS)

demo:  ## a page to ask the quickstart's model in a browser
	@test -d quickstart/checkpoint || { echo "make quickstart first: it trains the model that the page shows" >&2; exit 1; }
	$(MAKE) install EXTRAS=dev,demo
	$(PY) -c "from convllava_hf.cli.app import app; app()" demo quickstart/checkpoint $(ARGS)

test: $(READY)  ## the default tests: offline, on a CPU, with the newest versions
	$(PY) -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-slow: $(READY)  ## the tests that the default run leaves out because they take long
	$(PY) -m pytest -m slow -n $(WORKERS) --dist worksteal --timeout 3600 $(ARGS)

test-floor: $(FLOOR_READY)  ## the default tests with the lowest supported versions, in a second environment
	CONVLLAVA_HF_FLOOR=1 $(FLOOR_VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

docs: $(READY)  ## build the pages of docs/ as a site into build/site; broken links are errors
	@$(PY) -c "import mkdocs" || { echo "the site needs the extra docs: make docs EXTRAS=dev,docs" >&2; exit 1; }
	$(PY) -m mkdocs build --strict

dist: $(READY)  ## build wheel and sdist into dist/
	mkdir -p dist
	$(PY) -c 'from setuptools.build_meta import build_sdist, build_wheel; build_sdist("dist"); build_wheel("dist")'

quality: $(READY)  ## check style and formatting
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

style: $(READY)  ## repair style and formatting
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:  ## remove what runs and builds left behind; the environments stay
	rm -rf build dist src/*.egg-info .pytest_cache .ruff_cache quickstart
	find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

%/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found: name a Python with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is $$($(PYTHON) --version 2>&1), but 3.11 or newer is needed: name one with PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $*

# Needs: $(1) the environment. Puts uv into it, or says what is missing.
define get_uv
	@$(1)/bin/python -m pip --version >/dev/null 2>&1 || { \
	  echo "$(1) has no pip. On Debian and Ubuntu: install python3-venv, delete $(1), run make again." >&2; \
	  echo "Or reuse an environment that has pip with VENV=..., or one that has everything with PY=..." >&2; exit 1; }
	@$(1)/bin/python -m uv --version >/dev/null 2>&1 || $(1)/bin/python -m pip install --quiet uv || { \
	  echo "uv could not be installed with pip (see above): check the network, or use INSTALLER=pip." >&2; exit 1; }
endef

$(VENV)/.convllava-installed: setup.cfg pyproject.toml $(STALE) | $(VENV)/bin/python
ifeq ($(INSTALLER),pip)
	$(VENV)/bin/python -m pip install -e '.[$(EXTRAS)]'
else
	$(call get_uv,$(VENV))
	$(VENV)/bin/python -m uv pip install --compile-bytecode --python $(VENV)/bin/python -e '.[$(EXTRAS)]' || { \
	  echo "uv could not install the package (see above). uv does not read pip's configuration: set UV_DEFAULT_INDEX" >&2; \
	  echo "or SSL_CERT_FILE where your network needs them, or use INSTALLER=pip." >&2; exit 1; }
endif
	@echo '$(STAMP)' > $@

# The floors come from setup.cfg: uv picks the lowest version that each of our requirements allows.
$(FLOOR_READY): setup.cfg pyproject.toml $(FLOOR_STALE) | $(FLOOR_VENV)/bin/python
	$(call get_uv,$(FLOOR_VENV))
	$(FLOOR_VENV)/bin/python -m uv pip compile --quiet --upgrade --resolution lowest-direct --python $(FLOOR_VENV)/bin/python \
	  $(addprefix --extra ,$(subst $(comma), ,$(EXTRAS))) setup.cfg -o $(FLOOR_VENV)/floor.txt
	$(FLOOR_VENV)/bin/python -m uv pip install --compile-bytecode --python $(FLOOR_VENV)/bin/python -r $(FLOOR_VENV)/floor.txt
	$(FLOOR_VENV)/bin/python -m uv pip install --python $(FLOOR_VENV)/bin/python --no-deps -e .
	@echo '$(STAMP)' > $@
