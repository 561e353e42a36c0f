# Per-CPU private data areas. No program: setup.py builds them into hypervisor.percpu._percpu. Here: their tests.
#
# Each test is built three times: with sanitizers; with PV_PERCPU_INJECT, which widens the window inside each sequence; and PORTABLE, which has
# no sequences, so that TSAN sees all that the slow way does. modes.sh runs them where glibc, this library or nobody registers threads.
PERCPU_TESTS := $(TESTS_DIR)/percpu
PERCPU_SOURCES := $(wildcard percpu/*.c)
PERCPU_HEADERS := $(wildcard percpu/*.h $(PERCPU_TESTS)/*.h) common/cleanup.h
PERCPU_FLAGS := $(WARNINGS) $(HARDENING) -I$(abspath .) -I$(PERCPU_TESTS)
PERCPU_NAMES := adds area ring magazine trace context alias face

TESTS += $(addprefix $(OUT)/percpu-,$(PERCPU_NAMES)) $(OUT)/percpu-inject-ring $(OUT)/percpu-inject-area $(OUT)/percpu-break $(OUT)/percpu-delay $(OUT)/percpu-slice $(OUT)/percpu-modes
TSAN_TESTS += $(OUT)/tsan-percpu-area $(OUT)/tsan-percpu-ring $(OUT)/tsan-percpu-magazine $(OUT)/tsan-percpu-trace $(OUT)/tsan-percpu-few-adds
CLANG_CHECKS += percpu-clang-check
COVERED += percpu

$(OUT)/percpu-%: $(PERCPU_TESTS)/test_%.c $(PERCPU_SOURCES) $(PERCPU_HEADERS)
	$(CC) $(PERCPU_FLAGS) $(SANITIZE) -fsanitize=address,undefined $< $(PERCPU_SOURCES) -o $@ -pthread

PERCPU_INJECT := 100
$(OUT)/percpu-inject-area: PERCPU_INJECT := 3000 # so that an operation is under way when its item is freed
$(OUT)/percpu-inject-%: $(PERCPU_TESTS)/test_%.c $(PERCPU_SOURCES) $(PERCPU_HEADERS)
	$(CC) $(PERCPU_FLAGS) -O2 -g -DPV_PERCPU_INJECT=$(PERCPU_INJECT) $< $(PERCPU_SOURCES) -o $@ -pthread

$(OUT)/tsan-percpu-%: $(PERCPU_TESTS)/test_%.c $(PERCPU_SOURCES) $(PERCPU_HEADERS)
	$(CC) $(PERCPU_FLAGS) -DPV_PERCPU_PORTABLE $(SANITIZE) -fsanitize=thread $< $(PERCPU_SOURCES) -o $@ -pthread

# Fixed addresses, so that objdump's are those of the process; no sanitizer: it would put calls between the instructions' neighbours (and has
# an aligned_alloc of its own).
$(OUT)/percpu-break $(OUT)/percpu-delay $(OUT)/percpu-slice: $(OUT)/percpu-%: $(PERCPU_TESTS)/test_%.c $(PERCPU_SOURCES) $(PERCPU_HEADERS)
	$(CC) $(PERCPU_FLAGS) -O2 -g -no-pie $< $(PERCPU_SOURCES) -o $@ -pthread

$(OUT)/percpu-norseq: $(PERCPU_TESTS)/norseq.c
	$(CC) $(WARNINGS) $(HARDENING) -O2 -o $@ $<

$(OUT)/percpu-modes: $(PERCPU_TESTS)/modes.sh $(addprefix $(OUT)/percpu-,$(PERCPU_NAMES) norseq slice)
	@printf '%s\n' '#!/bin/sh' 'exec sh $(abspath $<) $(abspath $(OUT))' >$@
	@chmod +x $@

$(OUT)/tsan-percpu-few-adds: $(OUT)/tsan-percpu-adds
	@printf '%s\n' '#!/bin/sh' 'exec $(abspath $<) 1000000' >$@
	@chmod +x $@

# Not one of 10^9 adds lost, with and without signals; `make soak` runs it.
.PHONY: percpu-soak
percpu-soak: $(OUT)/percpu-adds $(OUT)/percpu-context
	$(OUT)/percpu-adds 1000000000
	$(OUT)/percpu-context 1000000000

.PHONY: percpu-clang-check
percpu-clang-check:
	$(CLANG) $(PERCPU_FLAGS) -O1 -fsyntax-only $(PERCPU_SOURCES) $(wildcard $(PERCPU_TESTS)/*.c)

# gcov wants one object a source: its notes and data lie beside the objects.
GCOV_PERCPU := $(patsubst percpu/%.c,$(OUT)/gcov/percpu/%.o,$(PERCPU_SOURCES))

$(OUT)/gcov/percpu/%.o: percpu/%.c $(PERCPU_HEADERS)
	@mkdir -p $(@D)
	$(CC) $(PERCPU_FLAGS) -O0 -g --coverage -c $(abspath $<) -o $@

$(OUT)/gcov/percpu-%: $(PERCPU_TESTS)/test_%.c $(GCOV_PERCPU)
	$(CC) $(PERCPU_FLAGS) -O0 -g $< $(GCOV_PERCPU) --coverage -o $@ -pthread

.PHONY: coverage-percpu
coverage-percpu: $(addprefix $(OUT)/gcov/percpu-,$(PERCPU_NAMES)) $(OUT)/percpu-norseq
	@rm -f $(OUT)/gcov/percpu/*.gcda
	@set -e; for t in $(filter-out %norseq,$^); do $$t; $(OUT)/percpu-norseq $$t; done

coverage: coverage-percpu

# The same on aarch64, in a guest; 77 means skipped, and the script has said why.
.PHONY: percpu-aarch64
percpu-aarch64:
	@sh $(PERCPU_TESTS)/aarch64.sh $(abspath .) $(abspath $(OUT))/aarch64 || [ $$? = 77 ]
