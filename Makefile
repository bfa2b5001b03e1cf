# Two commands are all a fresh machine needs: `make demo` and `make test`.
# Both need Python 3.11 or newer, make and a package registry, and install into .venv. Where there is a C compiler the
# hot path is compiled (setup.py), which takes some minutes once, and again whenever one of its sources changed.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
COMPILED := $(VENV)/.compiled
# Setuptools warns that folders here might hide an editable installation; they are what is installed.
PIP := $(BIN)/python -W 'ignore:Editable installation' -m pip install --quiet --disable-pip-version-check
SOURCES := setup.py $(wildcard router/*.py router/*/*.py state/*.py workers/calls.py workers/h2/*.py)

ARGS ?=
# Tests of the compiled modules' sources: they have to hold where nothing can be compiled, too.
INTERPRETED := tests/router tests/state tests/workers/h2

.PHONY: install demo test check bench protos fuzz ghz h2spec kube-apiserver clean

install: $(STAMP) $(COMPILED)

$(STAMP): pyproject.toml
	@echo "installing pointsman and what its tests need into $(VENV): one to three minutes ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade pip
	@POINTSMAN_COMPILE=0 $(PIP) --editable '.[dev]'
	@touch $@

$(COMPILED): $(SOURCES) | $(STAMP)
	@[ "$(POINTSMAN_COMPILE)" = 0 ] || \
	    echo "compiling the hot path, once and when its sources change: one to four minutes (log: $@.log) ..."
	@rm -f build/compiled.json
	@$(BIN)/python setup.py --quiet build_ext --inplace >$@.log 2>&1 || \
	    echo "it could not be compiled and stays interpreted; $@.log says why"
	@grep '^pointsman:' $@.log || true
	@[ -e build/compiled.json ] || find router state workers -name '*.so' -delete
	@touch $@

demo: install
	$(BIN)/pointsman demo $(ARGS)

# Both at once: the first waits most of the time.
test: install h2spec
	@mkdir -p build
	$(BIN)/python -m bench.interpreted pytest $(INTERPRETED) >build/interpreted.log 2>&1 & interpreted=$$!; \
	$(BIN)/python -m pytest $(ARGS); failed=$$?; \
	wait $$interpreted || failed=1; cat build/interpreted.log; exit $$failed

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/vulture
	$(BIN)/python -m protos.generate --check

protos: install
	$(BIN)/python -m protos.generate

bench: install
	$(BIN)/pointsman bench all $(ARGS)

# The load generator of the bundled ghz scripts (bench/ghz); the benchmarks also use Debian's wrk and nghttp2-client.
ghz:
	GOBIN=$(CURDIR)/bin GOFLAGS=-mod=mod go install github.com/bojand/ghz/cmd/ghz@v0.121.0

# h2spec is the conformance test of HTTP/2 servers; without Go its test is skipped.
h2spec:
	@if [ ! -x bin/h2spec ] && command -v go >/dev/null; then \
	    GOBIN=$(CURDIR)/bin GOFLAGS=-mod=mod go install github.com/summerwind/h2spec/cmd/h2spec@latest || true; fi

# A real Kubernetes API server, a quarter of an hour to build; with it and etcd (Debian's etcd-server) the tests of
# discovery run against it as well.
kube-apiserver:
	rm -rf build/kube_apiserver && mkdir -p build && cp -r tests/kube_apiserver build/
	cd build/kube_apiserver && go mod tidy && go build -o $(CURDIR)/bin/kube-apiserver k8s.io/kubernetes/cmd/kube-apiserver

# ARGS="--runs 1000000 --corpus FOLDER"
fuzz: install
	$(PIP) --editable '.[fuzz]'
	$(BIN)/python -m bench.fuzz $(ARGS)

clean:
	find router state workers -name '*.so' -delete
	rm -rf $(VENV) bin build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
