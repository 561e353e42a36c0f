# Page-frame database, address spaces, the fault server, and the library that is preloaded into QEMU.
MEMORY_FLAGS := -DPV_SOURCE_PATIENCE_MS=300 # nobody waits long for a test
MEMORY_TESTS := $(TESTS_DIR)/memory
MEMORY_SOURCES := $(filter-out memory/preload%.c,$(wildcard memory/*.c))
MEMORY_HEADERS := $(wildcard memory/*.h $(MEMORY_TESTS)/*.h) common/cleanup.h

PROGRAMS += $(LIBEXEC)/hv-ram.so
$(LIBEXEC)/hv-ram.so: memory/preload.c memory/preload_trim.c memory/preload.h
	$(CC) $(WARNINGS) $(HARDENING) $(CFLAGS) -shared -fPIC -fvisibility=hidden -o $@ $(filter %.c,$^) -ldl -lpthread

TESTS += $(OUT)/test-memory-space $(OUT)/test-memory-fault $(OUT)/test-memory-source $(OUT)/test-memory-loader $(OUT)/test-memory-place
TSAN_TESTS += $(OUT)/tsan-memory-space $(OUT)/tsan-memory-fault $(OUT)/tsan-memory-source $(OUT)/tsan-memory-loader

$(OUT)/test-memory-%: $(MEMORY_TESTS)/test_%.c $(MEMORY_SOURCES) $(MEMORY_HEADERS)
	$(CC) $(WARNINGS) $(HARDENING) $(MEMORY_FLAGS) $(SANITIZE) -fsanitize=address,undefined -o $@ $< $(MEMORY_SOURCES) -lpthread -lzstd

$(OUT)/tsan-memory-%: $(MEMORY_TESTS)/test_%.c $(MEMORY_SOURCES) $(MEMORY_HEADERS)
	$(CC) $(WARNINGS) $(HARDENING) $(MEMORY_FLAGS) $(SANITIZE) -fsanitize=thread -o $@ $< $(MEMORY_SOURCES) -lpthread -lzstd

FUZZERS += $(OUT)/fuzz-memory-zstd
$(OUT)/fuzz-memory-zstd: $(MEMORY_TESTS)/fuzz_zstd.c $(MEMORY_SOURCES) $(MEMORY_HEADERS)
	$(CLANG) $(WARNINGS) $(HARDENING) $(SANITIZE) -fsanitize=fuzzer,address,undefined $< $(MEMORY_SOURCES) -o $@ -lpthread -lzstd

CLANG_CHECKS += memory-clang-check
.PHONY: memory-clang-check
memory-clang-check:
	$(CLANG) $(WARNINGS) $(HARDENING) -O1 -fsyntax-only $(MEMORY_SOURCES) memory/preload.c memory/preload_trim.c

COVERED += memory

# gcov wants one object a source: its notes and data lie beside the objects.
GCOV_MEMORY := $(patsubst memory/%.c,$(OUT)/gcov/memory/%.o,$(MEMORY_SOURCES))

$(OUT)/gcov/memory/%.o: memory/%.c $(MEMORY_HEADERS)
	@mkdir -p $(@D)
	$(CC) $(WARNINGS) $(HARDENING) $(MEMORY_FLAGS) -O0 -g --coverage -c $< -o $@

$(OUT)/gcov/test-memory-%: $(MEMORY_TESTS)/test_%.c $(GCOV_MEMORY)
	$(CC) $(WARNINGS) $(HARDENING) -O0 -g $< $(GCOV_MEMORY) --coverage -o $@ -lpthread -lzstd

.PHONY: coverage-memory
coverage-memory: $(OUT)/gcov/test-memory-space $(OUT)/gcov/test-memory-fault $(OUT)/gcov/test-memory-source $(OUT)/gcov/test-memory-loader $(OUT)/gcov/test-memory-place
	@rm -f $(OUT)/gcov/memory/*.gcda
	@set -e; for t in $^; do $$t; done

coverage: coverage-memory
