# make demo   see it: virtual environment, install, demo
# make test   the whole test-suite
# make page   the tests of the server's page, in headless Chromium
# make bench  the benchmarks, some 13 minutes; bench-gil, bench-hotpath, ... one of them
# make seedtable  the table of the original experiment: ten languages beside diskread; as root, half an hour
# make dist   source distribution and wheel, built and checked
# make docs   the documentation, in build/docs
# make lint   what CI checks besides the tests
# make sanitize  the extension under ASan and UBSan
# make soak   a minute of disks that hang and recover at random
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/
EXTENSION = setup.py pyproject.toml $(wildcard src/diskread/*.h src/diskread/*.pyx src/diskread/*.pxd src/diskread/swift/*.pyx)

BENCHMARKS = gil hop hotpath coldread busyhub http_files

.PHONY: demo test page docs coverage bench seedtable $(BENCHMARKS:%=bench-%) lint sanitize soak dist clean prerequisites

demo: $(VENV)/.installed
	$(RUN)diskread demo

test: $(VENV)/.installed-test
	scripts/test-packages
	scripts/run-tests $(RUN)python

page: $(VENV)/.installed-page
	scripts/test-packages --page
	$(RUN)python -m pytest tests/page

docs: $(VENV)/.installed-docs
	$(RUN)python scripts/configuration-reference --check
	$(RUN)mkdocs build --strict --quiet

coverage: $(VENV)/.installed-test
	$(RUN)python -m pytest --cov --cov-report=term

bench: $(BENCHMARKS:%=bench-%)

$(BENCHMARKS:%=bench-%): bench-%: $(VENV)/.installed-bench
	$(RUN)python benchmarks/$*.py

seedtable: $(VENV)/.installed-bench
	$(RUN)python benchmarks/seedtable.py --install
	$(RUN)python benchmarks/seedtable.py

lint: $(VENV)/.installed-test $(VENV)/.installed-lint
	$(RUN)ruff format --check .
	$(RUN)ruff check .
	$(RUN)mypy

sanitize:
	scripts/test-sanitizers $(PYTHON)

soak: $(VENV)/.installed-test
	$(RUN)python benchmarks/soak.py --seconds 60

dist: $(VENV)/.installed-dist
	rm -rf dist
	$(RUN)python -m build
	scripts/check-dist $(RUN)

clean:
	rm -rf build dist $(VENV) src/*.egg-info src/diskread/*.c src/diskread/*.so src/diskread/swift/*.c src/diskread/swift/*.so

prerequisites:
	@scripts/prerequisites $(PYTHON)

$(VENV)/bin/python: | prerequisites
	$(PYTHON) -m venv $(VENV)
	$(RUN)python -m pip install --quiet --upgrade pip

$(VENV)/.installed: $(EXTENSION) | $(VENV)/bin/python
	$(RUN)python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(RUN)python -m pip install --quiet --group test --group swift
	touch $@

$(VENV)/.installed-page: $(VENV)/.installed-test
	$(RUN)python -m pip install --quiet --group page
	touch $@

$(VENV)/.installed-lint: $(VENV)/.installed
	$(RUN)python -m pip install --quiet --group lint
	touch $@

$(VENV)/.installed-dist: | $(VENV)/bin/python
	$(RUN)python -m pip install --quiet --group dist
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(RUN)python -m pip install --quiet --group docs
	touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	$(RUN)python -m pip install --quiet --group bench
	touch $@
