# What each target does: `make help`. Everything that a target needs, it installs or builds first.
SHELL := /bin/bash
.DELETE_ON_ERROR:
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
HV := $(BIN)/hv
STAMPS := build/stamps
JOBS := $(shell nproc)

.DEFAULT_GOAL := help
.PHONY: help install guest-image samples native cluster cluster-down lint types test test-all unit integration test-kvm soak c-test fuzz bench coverage clean distclean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# ---- what everything needs -------------------------------------------------------------------------------------------

$(STAMPS)/packages-run: tools/setup/packages.txt tools/setup/install-packages
	@mkdir -p $(@D)
	tools/setup/install-packages run build
	@touch $@

$(STAMPS)/packages-test: $(STAMPS)/packages-run
	tools/setup/install-packages test
	@touch $@

$(STAMPS)/venv: setup.cfg setup.py pyproject.toml $(STAMPS)/packages-run $(wildcard csrc/*/*.[ch] csrc/*/cffi_build.py)
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -e .
	@touch $@

$(STAMPS)/venv-test: $(STAMPS)/venv
	$(BIN)/pip install -q --disable-pip-version-check -e '.[test]'
	@touch $@

$(STAMPS)/packages-bench: $(STAMPS)/packages-test
	tools/setup/install-packages bench
	@touch $@

$(STAMPS)/venv-bench: $(STAMPS)/venv $(STAMPS)/packages-bench
	$(BIN)/pip install -q --disable-pip-version-check -e '.[bench]'
	@touch $@

install: $(STAMPS)/venv native ## packages, the venv with hv in it, the C extension and programs

native: $(STAMPS)/packages-run ## the C programs: hv-confine for the host, init and hv-exec for the guest
	@$(MAKE) --no-print-directory -C csrc

guest-image: native ## kernel, initramfs and root of the pod VMs, into guest-images/out
	@$(MAKE) --no-print-directory -C guest-images image

samples: guest-image ## sample OCI images busybox, python and web, into guest-images/out/samples
	@$(MAKE) --no-print-directory -C guest-images samples

# ---- a cluster on this machine ---------------------------------------------------------------------------------------

cluster: install samples ## master and two hosts in the background, a sample pod, a command run in it; harmless to run again
	@tools/cluster-up $(HV)

cluster-down: ## stop the cluster and its pods, and the host of its own that hv run made
	@[ -x $(HV) ] && $(HV) cluster down && $(HV) host stop --pods || true

# ---- tests -----------------------------------------------------------------------------------------------------------

PYTEST := $(BIN)/python -m pytest
# xunit1 is the form that has properties: what a test needs, and times that it took
RESULTS := build/results
JUNIT = -o junit_family=xunit1 --junit-xml=$(RESULTS)/$@.xml

test: lint types c-test unit integration ## everything that CI runs on any machine

test-all: test test-kvm ## that and the KVM lane; no test may have been skipped everywhere
	PYTHONPATH=tools $(BIN)/python -m lane.everywhere $(RESULTS)/unit.xml $(RESULTS)/integration.xml build/kvm-lane/results/junit.xml

lint: $(STAMPS)/venv-test ## ruff over Python, clang over C
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMPS)/venv-test ## mypy, strict
	$(BIN)/mypy

c-test: $(STAMPS)/packages-test ## C tests under ASAN, UBSAN and TSAN, clang's warnings, each fuzz target for some seconds
	$(MAKE) --no-print-directory -C csrc test tsan clang-check
	$(MAKE) --no-print-directory -C csrc fuzz FUZZ_SECONDS=5

unit: $(STAMPS)/venv-test $(STAMPS)/packages-test native ## tests that boot no guest
	$(PYTEST) $(JUNIT) tests/unit

integration: $(STAMPS)/venv-test $(STAMPS)/packages-test install samples ## tests that boot real guests
	$(PYTEST) $(JUNIT) tests/integration

# with QEMU=backports, SUITES=long, COVERAGE=1, BENCH=all: docs/testing.md
test-kvm: $(STAMPS)/venv-test $(STAMPS)/packages-test install samples ## tests under KVM with the kernel's vhost-vsock; without them, in a guest that has both
	tools/kvm-lane $(if $(QEMU),--qemu $(QEMU)) $(if $(SUITES),--suites $(SUITES)) $(if $(COVERAGE),--coverage) $(if $(BENCH),--bench $(BENCH)) $(LANE_FLAGS)

soak: export PYTEST_TIMEOUT := 0
soak: $(STAMPS)/venv-test $(STAMPS)/packages-test install samples ## the same again and again, for minutes: a device process killed 200 times, the master and its store 300, a host's daemon 200
	$(PYTEST) tests/integration -m soak
	$(MAKE) --no-print-directory -C csrc percpu-soak
	HV_STORE_KILLS=300 $(PYTEST) tests/unit/master/registry/test_registry_killed.py
	HV_MASTER_KILLS=300 $(PYTEST) tests/integration/test_master_kills.py
	HV_FUZZ_EXAMPLES=5000 $(PYTEST) tests/unit/master/schema/test_decoders_fuzzed.py
	HV_HOST_KILLS=200 $(PYTEST) tests/integration/test_cluster_pods.py
	HV_IOFILTER_KILLS=300 $(PYTEST) tests/integration/test_iofilter_kills.py

fuzz: $(STAMPS)/packages-test ## fuzz targets, FUZZ_SECONDS each (default 600)
	$(MAKE) --no-print-directory -C csrc fuzz FUZZ_SECONDS=$(or $(FUZZ_SECONDS),600)

coverage: $(STAMPS)/venv-test install samples ## line coverage of the host package and of the C code
	tools/coverage

bench: $(STAMPS)/venv-bench install samples ## figures, table and plots for docs/performance.md
	$(BIN)/python tools/bench/run.py

# ---- clean-up --------------------------------------------------------------------------------------------------------

clean: ## what was built (the venv and the guest image stay)
	rm -rf build .mypy_cache .ruff_cache .pytest_cache .hypothesis
	$(MAKE) --no-print-directory -C csrc clean

distclean: clean ## the venv and the guest image too
	rm -rf $(VENV) guest-images/out
