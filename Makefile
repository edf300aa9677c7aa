# SPDX-License-Identifier: Apache-2.0
# One command each; every target creates the environment it needs. See CONTRIBUTING.md.
#
#   PYTHON    Python 3.10 or newer, for stack A (default: python3)
#   PYTHON_B  Python 3.12, for stack B (default: the first one found)
#   FILE      tests to run instead of all, for instance FILE=tests/pipeline
#   PYTEST    arguments for pytest instead of those that choose all and use two cores, for instance PYTEST=-x
#   TORCH, MCORE, NVRX  versions for test-versions; NVRX= is none
#
# torch comes from pip's own index with its CUDA libraries. To save gigabytes on a machine without a GPU,
# point PIP_EXTRA_INDEX_URL at PyTorch's index of CPU wheels.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
PYTHON_B ?= $(shell for python in python3.12 "$$(pyenv prefix 3.12 2>/dev/null)/bin/python" $(PYTHON); do \
	"$$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null && echo "$$python" && break; \
	done)
PYTEST ?= -n 2 --dist worksteal -m "not slow and not long"
# Engine and pipeline without the slow files (exiting processes, failing threads, flipped bits, random bytes), the
# snippets of the documentation, and local checkpoints, which have no snippet.
QUICK := tests/native tests/format tests/storage tests/ranks tests/jobs tests/pipeline \
	$(addprefix --ignore=tests/, native/test_check_pickle.py native/test_copy_runs.py format/test_consistency.py \
		format/test_manifest.py jobs/test_background.py jobs/test_exit.py jobs/test_interrupted.py \
		$(addprefix pipeline/load/test_, damage.py decode.py hostile.py)) \
	tests/repository/documents/test_snippets.py::test_snippet_runs \
	tests/doors/local/test_manager.py::test_a_state_dict_comes_back_as_it_was

A := .venv
B := .venv-b
BRIDGE := .bridge
X := .venv-x
F := .venv-f
T := .venv-t
W := .venv-wheels
D := .venv-docs
CASES ?= 100000
HOURS ?= 1
TORCH ?= 2.13.0
MCORE ?= 0.19.2
NVRX ?= 0.7.0
# The tests that involve other packages: the doors, and training runs.
VERSIONS_PYTEST ?= -n 2 --dist worksteal -m "not slow and not long" tests/compat/test_features.py tests/api/test_signatures.py \
	tests/doors tests/interop tests/trainer/test_bridge.py tests/trainer/save/test_save.py \
	tests/trainer/save/test_async_save.py tests/trainer/contents/test_fsdp.py tests/trainer/contents/test_local.py \
	$(addprefix tests/trainer/load/test_, load.py resume_matrix.py resharding.py)
# Interpreters to build wheels for, of the supported versions that there are here. What a shell printed is lost
# to make if it ends with 127, as it does where the last one is missing.
PYTHONS ?= $(shell for version in 3.10 3.11 3.12 3.13 3.14; do \
	for python in "$$(pyenv prefix $$version 2>/dev/null)/bin/python" python$$version; do \
	"$$python" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$$version')" 2>/dev/null && \
	echo "$$python" && break; done; done; true)
SMOKE_PYTHONS ?= $(PYTHONS)
BUILD_INPUTS := setup.py pyproject.toml \
	$(shell find csrc -name '*.cc' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# Ranks of the tests share few cores; more threads than that only slow each other down.
export OMP_NUM_THREADS := 1

# In the environment $(1), of the framework that the shell's variable names.
bench-framework = PYTHONPATH=$(CURDIR) PYTHONWARNINGS=ignore $(1)/bin/python -m torch.distributed.run --standalone \
	--nproc-per-node 2 benchmarks/frameworks --framework "$$framework" --rounds 3

# The tests start dozens of processes, each of which would compile the project again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help
help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

.PHONY: test
test: $(A)/.installed ## build and run the tests on stack A, or those in FILE=
	@$(A)/bin/python -m pytest $(PYTEST) $(FILE)

.PHONY: quick
quick: $(A)/.installed ## engine, pipeline and one run for each door, in about a minute
	@$(A)/bin/python -m pytest $(PYTEST) $(QUICK)

.PHONY: test-b
test-b: $(B)/.installed ## the same on stack B
	@$(B)/bin/python -m pytest $(PYTEST) $(FILE)

.PHONY: test-stacks
test-stacks: ## the same on both stacks
	@$(MAKE) --no-print-directory test
	@$(MAKE) --no-print-directory test-b

.PHONY: test-versions
test-versions: $(X)/.versions-$(TORCH)-$(MCORE)-$(NVRX) ## part of the tests with TORCH=, MCORE=, NVRX=
	$(X)/bin/python setup.py --quiet build_ext --inplace
	@PYTHONPATH=$(CURDIR) $(X)/bin/python -m pytest $(VERSIONS_PYTEST)

.PHONY: test-bridge
test-bridge: $(B)/.installed $(BRIDGE)/.requirements ## Megatron Bridge's own objects, on stack B
	@PYTHONPATH=$(CURDIR)/$(BRIDGE) $(B)/bin/python -m pytest -n 2 tests/interop/test_bridge*.py

.PHONY: test-frameworks
test-frameworks: $(F)/.requirements ## Lightning, transformers, TorchTitan and others, on stack B
	@PYTHONPATH=$(CURDIR) $(F)/bin/python -m pytest tests/frameworks

.PHONY: bench-frameworks
bench-frameworks: $(F)/.requirements ## the saves of frameworks, with ckpt_fast and without, on two ranks; FRAMEWORK=NAME
	@for framework in $(if $(FRAMEWORK),"$(FRAMEWORK)","Lightning Fabric" "Lightning Trainer" Accelerate TorchTitan \
		"TorchTitan, async" Automodel); do $(call bench-framework,$(F)); done

.PHONY: test-torchtune
test-torchtune: $(T)/.requirements ## torchtune, with an older torch; gigabytes to install
	$(T)/bin/python setup.py --quiet build_ext --inplace
	@PYTHONPATH=$(CURDIR) $(T)/bin/python -m pytest tests/frameworks -k torchtune

.PHONY: bench-torchtune
bench-torchtune: $(T)/.requirements ## the same for torchtune
	$(T)/bin/python setup.py --quiet build_ext --inplace
	@for framework in torchtune "torchtune, async"; do $(call bench-framework,$(T)); done

.PHONY: test-long
test-long: $(B)/.installed ## the tests that take long, on stack B: many processes, many cases
	@$(B)/bin/python -m pytest -n 2 --dist worksteal -m "long and not slow"

.PHONY: crash
crash: $(A)/.installed ## every state in which a kill or power loss can leave a save; every call failing once
	@$(A)/bin/python -m pytest -m "slow or not slow" -rP tests/crash/states/test_states.py tests/crash/calls

.PHONY: kill
kill: $(A)/.installed ## kill -9 two thousand times, at random moments of runs on one and two ranks
	@$(A)/bin/python -m pytest -m slow -rP tests/crash/states/test_kill.py tests/crash/kills

.PHONY: fuzz
fuzz: $(A)/.installed ## checkpoints damaged in CASES= ways (100000), through every reader
	@$(A)/bin/python -m tests.fuzz --cases $(CASES)

.PHONY: soak
soak: $(A)/.installed ## save, load, fail and change for HOURS= (1), or MINUTES=; SEED= repeats one: nothing grows
	@PYTHONWARNINGS=ignore $(A)/bin/python -m tests.soak $(if $(MINUTES),--minutes $(MINUTES),--hours $(HOURS)) \
		$(if $(SEED),--seed $(SEED))

.PHONY: test-slow
test-slow: $(A)/.installed ## the tests that take hours: campaigns of faults, four ranks, long runs
	@$(A)/bin/python -m pytest -n 2 -m slow

.PHONY: demo
demo: $(A)/.installed ## train, get killed, resume, compare
	@PYTHONWARNINGS=ignore $(A)/bin/python examples/demo.py

.PHONY: bench
bench: $(A)/.installed ## benchmarks against the stock writers and readers
	@$(A)/bin/python -m pip install --quiet -r requirements/bench.txt
	@PYTHONWARNINGS=ignore $(A)/bin/python -m benchmarks
	@$(A)/bin/python scripts/charts.py

.PHONY: check
check: $(A)/.requirements format-check-cpp ## linters, formatters and types, those in the documentation too
	$(A)/bin/ruff check
	$(A)/bin/ruff format --check
	$(A)/bin/mypy
	$(A)/bin/mypy --platform darwin --cache-dir .mypy_cache/darwin
	$(A)/bin/mypy --platform win32 --cache-dir .mypy_cache/win32
	$(A)/bin/python scripts/check_snippets.py

.PHONY: check-pyright
check-pyright: $(A)/.requirements ## the types in the documentation, with pyright
	$(A)/bin/python -m pip install --quiet -r requirements/pyright.txt
	$(A)/bin/python scripts/check_snippets.py --pyright

.PHONY: docs
docs: $(D)/.requirements ## the documentation as a site, into site; links are checked
	@$(D)/bin/python -m mkdocs build --quiet --strict

.PHONY: wheels
wheels: $(W)/.requirements ## the sdist and all wheels, into dist: PYTHONS=, PROCESSORS=
	@$(W)/bin/python scripts/wheels.py $(addprefix --processor ,$(PROCESSORS)) --tools $(W)/tools $(PYTHONS)

.PHONY: smoke
smoke: ## install wheels and sdist in bare environments, save and load there: SMOKE_PYTHONS=, SMOKE_TORCH=
	@test -n "$(PYTHONS)" || { echo "no Python was found" >&2; exit 1; }
	@$(firstword $(PYTHONS)) scripts/smoke.py $(foreach version,$(SMOKE_TORCH),--torch $(version)) $(SMOKE_PYTHONS)

.PHONY: venv
venv: $(A)/.installed ## the environment of stack A, with the project in it

.PHONY: clean
clean: ## remove what was built; the environments stay
	rm -rf build dist site demo-run *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -f ckpt_fast/native/*.so $(A)/.installed $(B)/.installed
	find ckpt_fast tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# The checkpointing part of nvidia-resiliency-ext is pure Python; the platform tags of its wheels do not matter.
NVRX_OPTIONS := --quiet --no-deps --only-binary=:all: --platform manylinux_2_39_$(shell uname -m) \
	--platform manylinux_2_31_$(shell uname -m)

define require-python-b
@test -n "$(PYTHON_B)" || \
	{ echo "This needs Python 3.12 and none was found; choose one: make PYTHON_B=/path/to/python3.12" >&2; exit 1; }
endef

# The stamps are inside the environments, so that removing an environment removes them too.

$(A)/.requirements: requirements/stack-a.txt requirements/dev.txt requirements/optional.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$(PYTHON) is missing or older than Python 3.10; choose one: make PYTHON=python3.11" >&2; exit 1; }
	@$(A)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(A)
	$(A)/bin/python -m pip install --quiet -r $<
	@touch $@

$(B)/.requirements: requirements/stack-b.txt requirements/dev.txt requirements/optional.txt
	$(require-python-b)
	@$(B)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON_B) -m venv $(B)
	$(B)/bin/python -m pip install --quiet -r $<
	@test -d $(B)/lib/python3.12/site-packages/nvidia_resiliency_ext-0.7.0.dist-info || \
		$(B)/bin/python -m pip install $(NVRX_OPTIONS) --target $(B)/lib/python3.12/site-packages \
			nvidia-resiliency-ext==0.7.0
	@touch $@

# Replaces the installed versions; none are kept side by side.
$(X)/.versions-$(TORCH)-$(MCORE)-$(NVRX): requirements/dev.txt
	$(require-python-b)
	@$(X)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON_B) -m venv $(X)
	@rm -f $(X)/.versions-*
	$(X)/bin/python -m pip uninstall --quiet --yes nvidia-resiliency-ext
	$(X)/bin/python -m pip install --quiet -r $< torch==$(TORCH) megatron-core==$(MCORE) psutil PyYAML
	$(if $(NVRX),$(X)/bin/python -m pip install $(NVRX_OPTIONS) --target $(X)/lib/python3.12/site-packages \
		nvidia-resiliency-ext==$(NVRX))
	@touch $@

# The build's packages lie in a folder, for any interpreter: none of them is compiled for a certain one.
$(W)/.requirements: requirements/wheels.txt
	@$(W)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(W)
	$(W)/bin/python -m pip install --quiet -r $<
	rm -rf $(W)/tools
	$(W)/bin/python -m pip install --quiet --target $(W)/tools setuptools pybind11 ninja -c $<
	@touch $@

$(D)/.requirements: requirements/docs.txt
	@$(D)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(D)
	$(D)/bin/python -m pip install --quiet -r $<
	@touch $@

$(BRIDGE)/.requirements: requirements/bridge.txt | $(B)/.requirements
	rm -rf $(BRIDGE)
	$(B)/bin/python -m pip install --quiet --no-deps --target $(BRIDGE) -r $<
	@touch $@

$(F)/.requirements: requirements/frameworks.txt | $(B)/.installed
	rm -rf $(F)
	$(B)/bin/python -m venv $(F)
	echo $(CURDIR)/$(B)/lib/python3.12/site-packages > $(F)/lib/python3.12/site-packages/stack-b.pth
	$(F)/bin/python -m pip install --quiet --no-deps -r $<
	@touch $@

$(T)/.requirements: requirements/torchtune.txt requirements/dev.txt
	$(require-python-b)
	@$(T)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON_B) -m venv $(T)
	$(T)/bin/python -m pip install --quiet -r $<
	@touch $@

%/.installed: %/.requirements $(BUILD_INPUTS)
	PYTHONWARNINGS=ignore $*/bin/python -m pip install --quiet --editable .
	@touch $@

# build, cpp-test, cpp-fuzz and format-check-cpp
VENV := $(A)
include csrc/targets.mk
build cpp-test cpp-fuzz format-check-cpp: $(A)/.requirements
