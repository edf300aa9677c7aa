# SPDX-License-Identifier: Apache-2.0
# Native code: build it in place, test it without Python, check its format. Included by ../Makefile.

VENV ?= .venv
CPP_FILES = $(wildcard csrc/*/*.h csrc/*/*.cc csrc/*/*.cu csrc/*/*.cuh tests/cpp/*.h tests/cpp/*.cc)

.PHONY: build cpp-test format-check-cpp

build: ## compile the extension modules into the source tree (incremental)
	$(VENV)/bin/python -m pip install --quiet --no-build-isolation --no-deps --editable .

format-check-cpp: ## clang-format, without changing anything
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP_FILES)
