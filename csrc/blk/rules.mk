# The vhost-user-blk back end, the disk process hv-blkd, and a front end without a guest that tests and benches drive it with.

BLK_CORE := $(filter-out blk/guest.c,$(wildcard blk/*.c vhost/*.c)) # guest.c is for other languages, on top of disks.c
# without disks.c, which needs the NBD parts: who opens disks for another language links all of it
BLK_BELOW := $(filter-out iofilter/disks.c,$(wildcard iofilter/*.c iofilter/filters/*/*.c common/*.c))
BLK_HEADERS := $(wildcard blk/*.h blk/driver/*.h vhost/*.h iofilter/*.h common/*.h $(TESTS_DIR)/blk/*.h $(TESTS_DIR)/vsock/harness.h)
BLK_TESTS := $(wildcard $(TESTS_DIR)/blk/test_*.c) $(TESTS_DIR)/vsock/test_main.c
BLK_FUZZERS := $(patsubst $(TESTS_DIR)/blk/fuzz_%.c,$(OUT)/fuzz-blk-%,$(wildcard $(TESTS_DIR)/blk/fuzz_*.c))
BLK_FLAGS := $(WARNINGS) $(HARDENING) -I$(abspath .) -I$(TESTS_DIR)/blk -I$(TESTS_DIR)/vsock
BLK_LIBS := -pthread -luring -lcrypto

PROGRAMS += $(OUT)/hv-blkd $(OUT)/hv-blk-bench

# Objects: the filters are many, and change seldom.
$(OUT)/blk/plain/%.o: %.c $(BLK_HEADERS)
	@mkdir -p $(@D)
	$(CC) $(BLK_FLAGS) $(CFLAGS) -c $< -o $@

$(OUT)/blk/asan/%.o: %.c $(BLK_HEADERS)
	@mkdir -p $(@D)
	$(CC) $(BLK_FLAGS) $(SANITIZE) -fsanitize=address,undefined -c $< -o $@

$(OUT)/blk/tsan/%.o: %.c $(BLK_HEADERS)
	@mkdir -p $(@D)
	$(CC) $(BLK_FLAGS) -Wno-tsan $(SANITIZE) -fsanitize=thread -c $< -o $@

$(OUT)/blk/fuzz/%.o: %.c $(BLK_HEADERS)
	@mkdir -p $(@D)
	$(CLANG) $(BLK_FLAGS) $(SANITIZE) -fsanitize=fuzzer-no-link,address,undefined -c $< -o $@

$(OUT)/gcov/blk/%.o: %.c $(BLK_HEADERS)
	@mkdir -p $(@D)
	$(CC) $(BLK_FLAGS) -O0 -g --coverage -c $(abspath $<) -o $@

BLK_ALL := $(BLK_CORE) $(BLK_BELOW)
.PRECIOUS: $(OUT)/blk/plain/%.o $(OUT)/blk/asan/%.o $(OUT)/blk/tsan/%.o $(OUT)/blk/fuzz/%.o $(OUT)/gcov/blk/%.o

$(OUT)/hv-blkd: blk/program/main.c $(patsubst %.c,$(OUT)/blk/plain/%.o,$(BLK_ALL))
	$(CC) $(BLK_FLAGS) $(CFLAGS) $^ -o $@ $(BLK_LIBS)

$(OUT)/hv-blk-bench: blk/driver/bench.c $(OUT)/blk/plain/blk/driver/driver.o
	$(CC) $(BLK_FLAGS) $(CFLAGS) $^ -o $@

$(OUT)/test-blk: $(BLK_TESTS) $(patsubst %.c,$(OUT)/blk/asan/%.o,$(BLK_ALL) blk/driver/driver.c)
	$(CC) $(BLK_FLAGS) $(SANITIZE) -fsanitize=address,undefined $^ -o $@ $(BLK_LIBS)

$(OUT)/test-blk-tsan: $(BLK_TESTS) $(patsubst %.c,$(OUT)/blk/tsan/%.o,$(BLK_ALL) blk/driver/driver.c)
	$(CC) $(BLK_FLAGS) -Wno-tsan $(SANITIZE) -fsanitize=thread $^ -o $@ $(BLK_LIBS)

$(OUT)/fuzz-blk-%: $(TESTS_DIR)/blk/fuzz_%.c $(patsubst %.c,$(OUT)/blk/fuzz/%.o,$(BLK_ALL))
	$(CLANG) $(BLK_FLAGS) $(SANITIZE) -fsanitize=fuzzer,address,undefined $^ -o $@ $(BLK_LIBS)

$(OUT)/gcov/test-blk: $(BLK_TESTS) $(patsubst %.c,$(OUT)/gcov/blk/%.o,$(BLK_ALL) blk/driver/driver.c)
	$(CC) $(BLK_FLAGS) -O0 -g $^ -lgcov -o $@ $(BLK_LIBS)

.PHONY: coverage-blk clang-check-blk
coverage-blk: $(OUT)/gcov/test-blk
	@find $(OUT)/gcov/blk -name '*.gcda' -delete
	$<

coverage: coverage-blk

clang-check-blk:
	@set -e; for f in $(BLK_CORE) blk/program/main.c $(wildcard blk/driver/*.c) $(BLK_TESTS); do $(CLANG) $(BLK_FLAGS) -O2 -fsyntax-only $$f; done

TESTS += $(OUT)/test-blk
TSAN_TESTS += $(OUT)/test-blk-tsan
FUZZERS += $(BLK_FUZZERS)
CLANG_CHECKS += clang-check-blk
COVERED += blk vhost
