# Two commands: `make demo` and `make test` set everything up. `make help` lists the rest.
PYTHON ?= python3
PY := .venv/bin/python
# Two processes with two torch threads each spin against each other: one thread per process, and waiting threads sleep.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE
export HF_HUB_DISABLE_PROGRESS_BARS ?= 1
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO ?= 0

.PHONY: help install browser demo base test test-quick lint bench clean
help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

install: .venv/installed ## makes .venv and installs everything into it

.venv/installed: pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --disable-pip-version-check -c constraints.txt torch torchvision
	$(PY) -m pip install --disable-pip-version-check -c constraints.txt -e '.[demo,dev]'
	touch $@

demo: install ## the whole way on this machine; DEMO_EXIT=1 ends after one request, SCRATCH=1 makes the base anew first, and runs in runs/demo-scratch
	$(if $(SCRATCH),$(PY) -m jobs.make_base)
	$(PY) -m jobs.whole_way demo $(if $(DEMO_EXIT),--exit-after-request) $(if $(SCRATCH),--root runs/demo-scratch --base $(CURDIR)/runs/base/weights)

base: install ## makes the base of the demo anew, resumable: a few hours on 2 cores
	$(PY) -m jobs.make_base

browser: ## Chromium for the tests of the page, where it is missing and we are root on a Debian
	@has() { command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null; \
	has && command -v chromedriver >/dev/null && exit 0; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium chromium-driver) >/dev/null 2>&1; fi; \
	has && command -v chromedriver >/dev/null || echo "no chromium with a chromedriver here: the tests of the page in a browser will be skipped"

test: install browser ## every test
	$(PY) -m pytest

test-quick: install ## the tests that take no more than a few seconds each
	$(PY) -m pytest -m 'not slow'

lint: install ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: install ## benchmarks, in quick mode
	$(PY) -m benchmarks.training --quick
	$(PY) -m benchmarks.selection --quick
	$(PY) -m benchmarks.s3 --quick
	$(PY) -m benchmarks.curation --quick
	$(PY) -m benchmarks.serving --quick
	$(PY) -m benchmarks.serving_memory --quick

clean: ## removes what the runs and tests wrote; keeps .venv
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache
