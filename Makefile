# The commands of this project. Everything goes into the virtual environment $(VENV), made if it is missing.
VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
BIN = $(VENV)/bin

.PHONY: quickstart dev check test parity accelerators docs wheel
.DELETE_ON_ERROR:

quickstart: $(VENV)/installed
	$(BIN)/balora-jax run configs/quickstart.py

dev: $(VENV)/installed-test

test: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

check: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --quick

parity: $(VENV)/installed-test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,parity]'
	$(BIN)/python -m pytest tests/*/test_*_parity.py

# XLA's compilers for TPUs and NVIDIA GPUs, for tests/accelerators; kept apart, as JAX would look for such devices.
accelerators: $(VENV)/installed-compilers
	JAX_PLATFORMS=cpu PYTHONPATH=$(VENV)/compilers $(BIN)/python -m pytest tests/accelerators

$(VENV)/installed-compilers: $(VENV)/installed-test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/compilers \
		$$($(BIN)/python -c 'from importlib.metadata import requires, version as of; \
			print(next(r.split(";")[0] for r in requires("jax") if r.startswith("libtpu")), \
			"jax-cuda13-plugin==" + of("jax"), "jax-cuda13-pjrt==" + of("jax"), "nvidia-cudnn-cu13")')
	touch $@

docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 JAX_PLATFORMS=cpu $(BIN)/mkdocs build --strict

wheel: $(VENV)/installed
	rm -rf dist build
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	empty=$$(mktemp -d) && trap 'rm -rf "$$empty"' EXIT && $(BIN)/python -m venv "$$empty/venv" && \
	"$$empty/venv/bin/pip" install --quiet --disable-pip-version-check dist/*.whl && cd "$$empty" && \
	venv/bin/balora-jax run "$(CURDIR)/configs/quickstart.py" --training.steps 4 --training.eval-every 4 \
		--data.train-examples 100 --data.eval-examples 10 --optimizer.learning-rate 0.003 --seed 0

$(VENV)/installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; name it with make PYTHON=..." >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[report]'
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@
