# SPDX-License-Identifier: Apache-2.0
# Native code: build it in place, test it without Python, check its format. Included by ../Makefile.

VENV ?= .venv
CPP_FILES = $(wildcard $(addprefix csrc/, */*.h */*/*.h */*.cc */*/*.cc */*.cu) tests/cpp/*.h tests/cpp/*.cc)

.PHONY: build cpp-test cpp-test-arm format-check-cpp

build: ## compile the extension modules into the source tree (incremental)
	$(VENV)/bin/python -m pip install --quiet --no-build-isolation --no-deps --editable .

format-check-cpp: ## clang-format, without changing anything
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP_FILES)

CPP_TEST_DIR = build/cpp-test
CPP_TEST_SOURCES = $(wildcard csrc/engine/*/*.cc tests/cpp/*.cc)
CPP_TEST_HEADERS = $(wildcard csrc/engine/*/*.h tests/cpp/*.h)
CPP_TEST_FLAGS = -std=c++17 -O1 -g -Wall -Wextra -Werror -pthread -fno-omit-frame-pointer -Icsrc

cpp-test: $(CPP_TEST_DIR)/address $(CPP_TEST_DIR)/thread ## the engine's own tests under sanitizers
	$(CPP_TEST_DIR)/address
	$(CPP_TEST_DIR)/thread

$(CPP_TEST_DIR)/address: SANITIZERS = address,undefined -fno-sanitize-recover=all
$(CPP_TEST_DIR)/thread: SANITIZERS = thread

$(CPP_TEST_DIR)/address $(CPP_TEST_DIR)/thread: $(CPP_TEST_SOURCES) $(CPP_TEST_HEADERS)
	@mkdir -p $(@D)
	$(CXX) $(CPP_TEST_FLAGS) -fsanitize=$(SANITIZERS) $(CPP_TEST_SOURCES) -o $@

# aarch64 as in Grace. Statically linked, so that the emulator needs no libraries of that processor.
ARM_CXX ?= aarch64-linux-gnu-g++
ARM_RUN ?= $(shell command -v qemu-aarch64 || command -v qemu-aarch64-static || true)

cpp-test-arm: ## the same tests for aarch64, under emulation; says so if there is no cross-compiler or emulator
	@if command -v $(ARM_CXX) >/dev/null && test -n "$(ARM_RUN)"; then \
		$(MAKE) --no-print-directory $(CPP_TEST_DIR)/aarch64 && $(ARM_RUN) $(CPP_TEST_DIR)/aarch64; \
	else \
		echo "cpp-test-arm: NOT RUN, it needs a cross-compiler and an emulator" \
			"(Debian: g++-aarch64-linux-gnu, qemu-user)" >&2; \
		test "$(FAIL_WITHOUT_ARM)" != 1; \
	fi

$(CPP_TEST_DIR)/aarch64: $(CPP_TEST_SOURCES) $(CPP_TEST_HEADERS)
	@mkdir -p $(@D)
	$(ARM_CXX) $(filter-out -fno-omit-frame-pointer, $(CPP_TEST_FLAGS)) -static $(CPP_TEST_SOURCES) -o $@
