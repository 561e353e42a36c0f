# The vhost-user-vsock back end, with the vhost-user core that it shares. It is no program: setup.py builds it into hypervisor.vsock._vsock. Here: its tests.
# The same sources are built again for each kind of test, with other flags.

VSOCK_SOURCES := $(wildcard vsock/*.c vhost/*.c) common/iov.c
VSOCK_HEADERS := $(wildcard vsock/*.h vhost/*.h common/*.h $(TESTS_DIR)/vsock/*.h)
VSOCK_TEST_SOURCES := $(wildcard $(TESTS_DIR)/vsock/test_*.c) $(TESTS_DIR)/vsock/frontend.c
VSOCK_FUZZERS := $(patsubst $(TESTS_DIR)/vsock/fuzz_%.c,$(OUT)/fuzz-vsock-%,$(wildcard $(TESTS_DIR)/vsock/fuzz_*.c))
VSOCK_FLAGS := $(WARNINGS) $(HARDENING) -I$(abspath .) -I$(TESTS_DIR)/vsock

$(OUT)/test-vsock: $(VSOCK_SOURCES) $(VSOCK_TEST_SOURCES) $(VSOCK_HEADERS)
	$(CC) $(VSOCK_FLAGS) $(SANITIZE) -fsanitize=address,undefined $(VSOCK_SOURCES) $(VSOCK_TEST_SOURCES) -o $@ -pthread

$(OUT)/test-vsock-tsan: $(VSOCK_SOURCES) $(VSOCK_TEST_SOURCES) $(VSOCK_HEADERS)
	$(CC) $(VSOCK_FLAGS) -Wno-tsan $(SANITIZE) -fsanitize=thread $(VSOCK_SOURCES) $(VSOCK_TEST_SOURCES) -o $@ -pthread

# gcov wants one object a source: its notes and data lie beside the objects. Absolute names, so that gcovr finds the sources.
GCOV_VSOCK := $(patsubst %.c,$(OUT)/gcov/%.o,$(VSOCK_SOURCES))

$(OUT)/gcov/vsock/%.o: vsock/%.c $(VSOCK_HEADERS)
	@mkdir -p $(@D)
	$(CC) $(VSOCK_FLAGS) -O0 -g --coverage -c $(abspath $<) -o $@

$(OUT)/gcov/common/%.o: common/%.c $(VSOCK_HEADERS)
	@mkdir -p $(@D)
	$(CC) $(VSOCK_FLAGS) -O0 -g --coverage -c $(abspath $<) -o $@

$(OUT)/gcov/vhost/%.o: vhost/%.c $(VSOCK_HEADERS)
	@mkdir -p $(@D)
	$(CC) $(VSOCK_FLAGS) -O0 -g --coverage -c $(abspath $<) -o $@

$(OUT)/gcov/test-vsock: $(GCOV_VSOCK) $(VSOCK_TEST_SOURCES) $(VSOCK_HEADERS)
	$(CC) $(VSOCK_FLAGS) -O0 -g $(VSOCK_TEST_SOURCES) $(GCOV_VSOCK) -lgcov -o $@ -pthread

.PHONY: coverage-vsock
coverage-vsock: $(OUT)/gcov/test-vsock
	@rm -f $(OUT)/gcov/vsock/*.gcda
	$<

coverage: coverage-vsock

.PHONY: clang-check-vsock
clang-check-vsock:
	@set -e; for f in $(VSOCK_SOURCES) $(VSOCK_TEST_SOURCES); do $(CLANG) $(VSOCK_FLAGS) -O2 -fsyntax-only $$f; done

$(OUT)/fuzz-vsock-%: $(TESTS_DIR)/vsock/fuzz_%.c $(TESTS_DIR)/vsock/frontend.c $(VSOCK_SOURCES) $(VSOCK_HEADERS)
	$(CLANG) $(VSOCK_FLAGS) $(SANITIZE) -fsanitize=fuzzer,address,undefined $< $(TESTS_DIR)/vsock/frontend.c $(VSOCK_SOURCES) -o $@ -pthread

TESTS += $(OUT)/test-vsock
TSAN_TESTS += $(OUT)/test-vsock-tsan
FUZZERS += $(VSOCK_FUZZERS)
CLANG_CHECKS += clang-check-vsock
COVERED += vsock
