# hv-exec: the guest's static helper that puts a process into a container. Its tests and its fuzz target.
EXEC_SOURCES := $(wildcard exec/*.c)
EXEC_LIBRARY := $(filter-out exec/main.c exec/pause.c,$(EXEC_SOURCES))
EXEC_HEADERS := exec/exec.h exec/clone.h common/cleanup.h
EXEC_FLAGS := $(HARDENING) $(WARNINGS) -I$(abspath .)

PROGRAMS += $(GUEST)/hv-exec
TESTS += $(OUT)/test-exec
FUZZERS += $(OUT)/fuzz-exec-request
CLANG_CHECKS += clang-check-exec

# Static: a dynamic program costs a hundred milliseconds under TCG before main() (docs/agent.md).
$(GUEST)/hv-exec: $(EXEC_SOURCES) $(EXEC_HEADERS) exec/rules.mk
	$(CC) $(CFLAGS) $(EXEC_FLAGS) -static -o $@ $(EXEC_SOURCES)

$(OUT)/test-exec: $(TESTS_DIR)/exec/test_request.c $(EXEC_LIBRARY) $(EXEC_HEADERS)
	$(CC) $(EXEC_FLAGS) $(SANITIZE) -fsanitize=address,undefined -o $@ $< $(EXEC_LIBRARY)

$(OUT)/fuzz-exec-request: $(TESTS_DIR)/exec/fuzz_request.c $(EXEC_LIBRARY) $(EXEC_HEADERS)
	$(CLANG) $(EXEC_FLAGS) $(SANITIZE) -fsanitize=fuzzer,address,undefined -o $@ $< $(EXEC_LIBRARY)

.PHONY: clang-check-exec
clang-check-exec:
	$(CLANG) $(EXEC_FLAGS) -O2 -fsyntax-only $(EXEC_SOURCES)
