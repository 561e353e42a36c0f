# Virtual disks: requests, instances, filters, data. No program: setup.py builds it into hypervisor.iofilter._iofilter. Here: its tests,
# one program a file, and its fuzz targets. What a test shares with others lies in tests/c/iofilter/*.h.
IOFILTER_SOURCES := $(wildcard iofilter/*.c iofilter/filters/*/*.c nbd/*.c common/*.c)
IOFILTER_TESTS_DIR := $(TESTS_DIR)/iofilter
IOFILTER_HEADERS := $(wildcard iofilter/*.h iofilter/filters/*/*.h nbd/*.h common/*.h $(IOFILTER_TESTS_DIR)/*.h)
IOFILTER_FLAGS := $(WARNINGS) $(HARDENING) -I$(abspath .) -I$(IOFILTER_TESTS_DIR)
IOFILTER_LIBS := -pthread -luring -lcrypto
IOFILTER_TESTS := $(patsubst $(IOFILTER_TESTS_DIR)/test_%.c,%,$(wildcard $(IOFILTER_TESTS_DIR)/test_*.c))
IOFILTER_FUZZERS := $(patsubst $(IOFILTER_TESTS_DIR)/fuzz_%.c,$(OUT)/fuzz-iofilter-%,$(wildcard $(IOFILTER_TESTS_DIR)/fuzz_*.c))

# The sources are built once for each kind of test, as objects.
$(OUT)/iofilter/asan/%.o: %.c $(IOFILTER_HEADERS)
	@mkdir -p $(@D)
	$(CC) $(IOFILTER_FLAGS) $(SANITIZE) -fsanitize=address,undefined -c $< -o $@

$(OUT)/iofilter/tsan/%.o: %.c $(IOFILTER_HEADERS)
	@mkdir -p $(@D)
	$(CC) $(IOFILTER_FLAGS) -Wno-tsan $(SANITIZE) -fsanitize=thread -c $< -o $@

$(OUT)/iofilter/fuzz/%.o: %.c $(IOFILTER_HEADERS)
	@mkdir -p $(@D)
	$(CLANG) $(IOFILTER_FLAGS) $(SANITIZE) -fsanitize=fuzzer-no-link,address,undefined -c $< -o $@

$(OUT)/gcov/iofilter/%.o: %.c $(IOFILTER_HEADERS)
	@mkdir -p $(@D)
	$(CC) $(IOFILTER_FLAGS) -O0 -g --coverage -c $(abspath $<) -o $@

IOFILTER_ASAN := $(patsubst %.c,$(OUT)/iofilter/asan/%.o,$(IOFILTER_SOURCES))
IOFILTER_TSAN := $(patsubst %.c,$(OUT)/iofilter/tsan/%.o,$(IOFILTER_SOURCES))
IOFILTER_FUZZ := $(patsubst %.c,$(OUT)/iofilter/fuzz/%.o,$(IOFILTER_SOURCES))
IOFILTER_GCOV := $(patsubst %.c,$(OUT)/gcov/iofilter/%.o,$(IOFILTER_SOURCES))
.PRECIOUS: $(IOFILTER_ASAN) $(IOFILTER_TSAN) $(IOFILTER_FUZZ) $(IOFILTER_GCOV)

$(OUT)/test-iofilter-%: $(IOFILTER_TESTS_DIR)/test_%.c $(IOFILTER_ASAN)
	$(CC) $(IOFILTER_FLAGS) $(SANITIZE) -fsanitize=address,undefined $< $(IOFILTER_ASAN) -o $@ $(IOFILTER_LIBS)

$(OUT)/tsan-iofilter-%: $(IOFILTER_TESTS_DIR)/test_%.c $(IOFILTER_TSAN)
	$(CC) $(IOFILTER_FLAGS) -Wno-tsan $(SANITIZE) -fsanitize=thread $< $(IOFILTER_TSAN) -o $@ $(IOFILTER_LIBS)

$(OUT)/fuzz-iofilter-%: $(IOFILTER_TESTS_DIR)/fuzz_%.c $(IOFILTER_FUZZ)
	$(CLANG) $(IOFILTER_FLAGS) $(SANITIZE) -fsanitize=fuzzer,address,undefined $< $(IOFILTER_FUZZ) -o $@ $(IOFILTER_LIBS)

$(OUT)/gcov/test-iofilter-%: $(IOFILTER_TESTS_DIR)/test_%.c $(IOFILTER_GCOV)
	$(CC) $(IOFILTER_FLAGS) -O0 -g $< $(IOFILTER_GCOV) --coverage -o $@ $(IOFILTER_LIBS)

.PHONY: coverage-iofilter clang-check-iofilter
coverage-iofilter: $(patsubst %,$(OUT)/gcov/test-iofilter-%,$(IOFILTER_TESTS))
	@find $(OUT)/gcov/iofilter -name '*.gcda' -delete
	@set -e; for t in $^; do $$t; done

coverage: coverage-iofilter

clang-check-iofilter:
	@set -e; for f in $(IOFILTER_SOURCES) $(wildcard $(IOFILTER_TESTS_DIR)/*.c); do $(CLANG) $(IOFILTER_FLAGS) -O2 -fsyntax-only $$f; done

TESTS += $(patsubst %,$(OUT)/test-iofilter-%,$(IOFILTER_TESTS))
TSAN_TESTS += $(OUT)/tsan-iofilter-instance $(OUT)/tsan-iofilter-nbd
FUZZERS += $(IOFILTER_FUZZERS)
CLANG_CHECKS += clang-check-iofilter
COVERED += iofilter

# Built as it is used: no sanitizer slows the writer that is to be killed in the middle of things. pytest runs it.
$(OUT)/iofilter/plain/%.o: %.c $(IOFILTER_HEADERS)
	@mkdir -p $(@D)
	$(CC) $(IOFILTER_FLAGS) $(CFLAGS) -c $< -o $@

IOFILTER_PLAIN := $(patsubst %.c,$(OUT)/iofilter/plain/%.o,$(IOFILTER_SOURCES))
.PRECIOUS: $(IOFILTER_PLAIN)

$(OUT)/crash-iofilter: $(IOFILTER_TESTS_DIR)/crash_checker.c $(IOFILTER_PLAIN)
	$(CC) $(IOFILTER_FLAGS) $(CFLAGS) $< $(IOFILTER_PLAIN) -o $@ $(IOFILTER_LIBS)

.PHONY: crash-iofilter
crash-iofilter: $(OUT)/crash-iofilter ## the program that kills writers
