# The two commands are `make demo` and `make test`; `make help` lists the rest. Each target does all the set-up it needs
# (scripts/ holds the steps), says one line per step, and leaves the whole output under .cache/logs. V=1 shows it live.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# Seconds per target: a bounded run with one seed in `make test`, a long one in `make fuzz`.
FUZZ_TEST_SECONDS ?= 10
FUZZ_SECONDS ?= 600
SOAK_SECONDS ?= 600
STORE_SEEDS ?= 5000

VENV := $(CURDIR)/.venv
# Cargo's build scripts look for Python too; one answer for all of them keeps builds from undoing one another.
export VIRTUAL_ENV := $(VENV)
export PATH := $(VENV)/bin:$(PATH):$(HOME)/.cargo/bin
export V

STEP := scripts/step
RUST_SOURCES := Cargo.toml Cargo.lock crates
SHELL_SCRIPTS := .ci/run $(filter-out %.txt %.py,$(wildcard scripts/*)) $(wildcard packaging/debian/*/p*)

# Recipes shared by a target of its own and by `test`, which runs them one after another: reactors poll, and a test that
# shares its cores with a compiler measures the compiler.
define run-test-rust
$(STEP) rust-tests --say -- scripts/test-rust
endef
define run-test-python
$(STEP) python-tests --say -- $(VENV)/bin/python -m pytest --durations=15 --durations-min=5
endef
define run-test-fuzz
$(STEP) fuzz --say -- scripts/fuzz --seconds $(FUZZ_TEST_SECONDS) --seed 1
endef

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

.PHONY: demo
demo: build ## Boot a guest on a Ringstone volume, run fio in it with verification, show the result
	@$(VENV)/bin/ringstone demo $(DEMO_ARGS)

.PHONY: lab
lab: engine lab-packages ## Start Ceph, etcd and hosts with a gateway each on this machine, until Ctrl-C (root)
	@$(VENV)/bin/ringstone lab $(LAB_ARGS)

.PHONY: test
test: build lint qemus older-release lab-packages ## Lint and run every test
	@$(run-test-rust)
	@$(run-test-fuzz)
	@$(run-test-python)

.PHONY: setup
setup: packages rust python-env ## Debian packages, Rust toolchain, .venv

.PHONY: build
build: engine guest-image ## The engine in place and the guest image

.PHONY: packages lab-packages rust python-env engine guest-image qemus older-release
packages:
	@$(STEP) debian-packages -- scripts/debian-packages
lab-packages: packages ## Debian packages of Ceph and etcd, for `make lab` and the tests
	@$(STEP) lab-packages -- scripts/debian-packages --no-services scripts/debian-packages-lab.txt
rust: packages
	@$(STEP) rust-toolchain --say -- scripts/rust-toolchain
python-env: packages
	@$(STEP) python-env --inputs requirements-dev.lock scripts/python-env --outputs .venv/bin/pytest -- scripts/python-env
engine: rust python-env
	@$(STEP) engine --inputs $(RUST_SOURCES) pyproject.toml --outputs python/ringstone/_engine.abi3.so .venv/bin/ringstone \
		-- scripts/engine
guest-image: python-env
	@$(STEP) guest-image -- env PYTHONPATH=python $(VENV)/bin/python -m ringstone.hypervisor.guest_image
qemus: packages ## Debian's versions of QEMU and the guest's kernel beside the installed ones, for tests
	@$(STEP) qemus --inputs scripts/qemus scripts/debian-root --outputs .cache/qemus/11.1 --say -- scripts/qemus
older-release: rust python-env ## An older state of this project, for tests that upgrade from it; takes the whole history
	@$(STEP) older-release --inputs scripts/older-release --outputs .cache/older-release/site -- scripts/older-release

.PHONY: package
package: engine ## The wheel and Debian packages in dist/, for SUITE=bookworm or trixie (this machine's)
	@$(STEP) package --say -- $(VENV)/bin/python packaging/make_packages.py $(addprefix --suite ,$(SUITE)) $(PACKAGE_ARGS)

.PHONY: lint rustfmt clippy ruff mypy shellcheck
lint: rustfmt clippy ruff mypy shellcheck ## rustfmt, clippy, ruff, mypy, shellcheck; warnings are errors
rustfmt: rust
	@$(STEP) rustfmt -- cargo fmt --all --check
clippy: rust python-env
	@$(STEP) clippy -- cargo clippy --locked --workspace --all-targets --no-default-features -- -D warnings
ruff: python-env
	@$(STEP) ruff -- $(VENV)/bin/ruff check
	@$(STEP) ruff-format -- $(VENV)/bin/ruff format --check
mypy: python-env
	@$(STEP) mypy --say -- $(VENV)/bin/mypy
shellcheck: packages
	@$(STEP) shellcheck -- shellcheck -x $(SHELL_SCRIPTS)

.PHONY: test-rust test-python test-lab fuzz soak bench
test-rust: rust ## The Rust tests alone
	@$(run-test-rust)
test-python: build qemus older-release lab-packages ## The Python tests alone: unit, functional and with a real guest
	@$(run-test-python)
test-lab: engine lab-packages ## The unit tests in Python and those with Ceph and etcd, without guests: for another Debian's
	@$(STEP) lab-tests --say -- $(VENV)/bin/python -m pytest --durations=15 --durations-min=5 -m "not soak and not guest" \
		tests/unit $(addprefix tests/functional/test_,rbd.py snapshots.py conformance.py cut_short.py lab.py state.py state_kinds.py \
		etcd_access.py manager.py away.py tcp.py) $(addprefix tests/failure/test_,etcd.py fencing.py full_cluster.py lab.py)
fuzz: rust ## Fuzz the rings and the control messages, FUZZ_SECONDS (600) each
	@$(STEP) fuzz-long --say -- scripts/fuzz --seconds $(FUZZ_SECONDS)
soak: build qemus older-release lab-packages ## The tests that run for long; SOAK_SECONDS (600), STORE_SEEDS (5000) say how long
	@$(STEP) store-soak --say -- env RINGSTONE_STORE_SEEDS=$(STORE_SEEDS) cargo test --profile fuzz -p ringstone-store --test crash_model
	@$(STEP) soak --say -- env RINGSTONE_SOAK_SECONDS=$(SOAK_SECONDS) $(VENV)/bin/python -m pytest -m soak
bench: build ## Measure the gateway against qemu-storage-daemon and the machine's limits
	@$(VENV)/bin/ringstone bench suite $(BENCH_ARGS)

.PHONY: in-debian
in-debian: packages ## make TARGET (demo) of the last commit in a fresh Debian SUITE (trixie) of its own, removed afterwards (root)
	@OLD_MIRROR=$(OLD_MIRROR) scripts/in-debian $(or $(SUITE),trixie) $(or $(TARGET),demo)

.PHONY: format lock
format: rust python-env ## Format Rust and Python
	@cargo fmt --all
	@$(VENV)/bin/ruff check --fix --select I --quiet
	@$(VENV)/bin/ruff format --quiet
lock: python-env ## Lock anew what pyproject.toml asks for
	@$(STEP) lock -- scripts/lock $(LOCK_ARGS)

.PHONY: clean
clean: ## Remove all that was built, downloaded or logged; .venv too
	@rm -rf dist target fuzz/artifacts fuzz/corpus .cache .venv python/ringstone/_engine.abi3.so demo-report.html
	@find python tests -name __pycache__ -type d -prune -exec rm -rf {} +
