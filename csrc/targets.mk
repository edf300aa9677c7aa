# SPDX-License-Identifier: Apache-2.0
# Native code: build it in place, test it without Python, check its format. Included by ../Makefile.

VENV ?= .venv
CPP_FILES = $(wildcard $(addprefix csrc/, */*.h */*/*.h */*.cc */*/*.cc */*.cu) \
	$(addprefix tests/cpp/, *.h *.cc */*.h */*.cc))

.PHONY: build cpp-test cpp-test-arm cpp-fuzz format-check-cpp

build: ## compile the extension modules into the source tree (incremental)
	$(VENV)/bin/python -m pip install --quiet --no-build-isolation --no-deps --editable .

format-check-cpp: ## clang-format, without changing anything
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP_FILES)

CPP_TEST_DIR = build/cpp-test
CPP_TEST_SOURCES = $(wildcard csrc/engine/*/*.cc tests/cpp/*.cc)
CPP_TEST_HEADERS = $(wildcard csrc/engine/*/*.h tests/cpp/*.h)
CPP_TEST_FLAGS = -std=c++17 -O1 -g -Wall -Wextra -Werror -pthread -fno-omit-frame-pointer -Icsrc

CPP_FUZZ_DIR = build/cpp-fuzz
CPP_FUZZ_TARGETS = pickle read
CPP_FUZZ = $(CPP_FUZZ_TARGETS:%=$(CPP_FUZZ_DIR)/%) $(CPP_FUZZ_DIR)/seeds

cpp-test: $(CPP_TEST_DIR)/address $(CPP_TEST_DIR)/thread $(CPP_FUZZ) ## the engine's own tests and a little fuzzing, under sanitizers
	$(CPP_TEST_DIR)/address
	$(CPP_TEST_DIR)/thread
	cd $(CPP_FUZZ_DIR) $(foreach target,$(CPP_FUZZ_TARGETS),&& ./$(target) -runs=20000 -seed=1 seeds/$(target))

$(CPP_TEST_DIR)/address: SANITIZERS = address,undefined -fno-sanitize-recover=all
$(CPP_TEST_DIR)/thread: SANITIZERS = thread

$(CPP_TEST_DIR)/address $(CPP_TEST_DIR)/thread: $(CPP_TEST_SOURCES) $(CPP_TEST_HEADERS)
	@mkdir -p $(@D)
	$(CXX) $(CPP_TEST_FLAGS) -fsanitize=$(SANITIZERS) $(CPP_TEST_SOURCES) -o $@

# With clang, that of libFuzzer; with others, our own.
CPP_FUZZ_DRIVER = $(if $(findstring clang,$(CXX)),,$(CPP_FUZZ_DIR)/driver.o $(CPP_FUZZ_DIR)/mutations.o)
CPP_FUZZ_FLAGS = $(CPP_TEST_FLAGS) -Itests/cpp -fsanitize=address,undefined -fno-sanitize-recover=all \
	-fsanitize$(if $(findstring clang,$(CXX)),=fuzzer,-coverage=trace-pc)

cpp-fuzz: $(CPP_FUZZ) ## what reads bytes and numbers of a checkpoint, under sanitizers, MINUTES= (10) for each target
	cd $(CPP_FUZZ_DIR) && mkdir -p $(CPP_FUZZ_TARGETS:%=corpus/%)
	cd $(CPP_FUZZ_DIR) $(foreach target,$(CPP_FUZZ_TARGETS),&& ./$(target) $(if $(SEED),-seed=$(SEED)) \
		-max_total_time=$$((60 * $(or $(MINUTES),10))) corpus/$(target) seeds/$(target))

$(CPP_FUZZ_DIR)/pickle: CPP_FUZZ_SOURCES = $(wildcard csrc/engine/pickle/*.cc)
$(CPP_FUZZ_DIR)/read: CPP_FUZZ_SOURCES = tests/cpp/temporary.cc $(wildcard $(addprefix csrc/engine/, \
	base/*.cc checksum/*.cc io/*.cc memory/*.cc))

$(CPP_FUZZ_TARGETS:%=$(CPP_FUZZ_DIR)/%): $(CPP_FUZZ_DIR)/%: tests/cpp/fuzz/%_target.cc tests/cpp/fuzz/mutations.h \
		$(CPP_FUZZ_DRIVER) $(CPP_TEST_SOURCES) $(CPP_TEST_HEADERS)
	$(CXX) $(CPP_FUZZ_FLAGS) $< $(CPP_FUZZ_SOURCES) $(CPP_FUZZ_DRIVER) -o $@

$(CPP_FUZZ_DIR)/%.o: tests/cpp/fuzz/%.cc tests/cpp/fuzz/mutations.h
	@mkdir -p $(@D)
	$(CXX) $(CPP_TEST_FLAGS) -Itests/cpp -c $< -o $@

$(CPP_FUZZ_DIR)/seeds: tests/fuzz/native_seeds.py tests/fuzz/checkpoints.py
	rm -rf $@
	CKPT_FAST_NATIVE=0 CKPT_FAST_FSYNC=0 PYTHONPATH=$(CURDIR) PYTHONWARNINGS=ignore \
		$(VENV)/bin/python -m tests.fuzz.native_seeds $@

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
