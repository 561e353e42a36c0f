# Page-frame database and address spaces. No program of its own yet: the fault server in vmx will be built on them.
MEMORY_SOURCES := memory/pfdb.c memory/space.c
MEMORY_HEADERS := $(wildcard memory/*.h) common/cleanup.h
MEMORY_TEST := $(TESTS_DIR)/memory/test_space.c

TESTS += $(OUT)/test-memory
$(OUT)/test-memory: $(MEMORY_TEST) $(MEMORY_SOURCES) $(MEMORY_HEADERS)
	$(CC) $(WARNINGS) $(HARDENING) $(SANITIZE) -fsanitize=address,undefined -o $@ $(MEMORY_TEST) $(MEMORY_SOURCES) -lpthread

TSAN_TESTS += $(OUT)/test-memory-tsan
$(OUT)/test-memory-tsan: $(MEMORY_TEST) $(MEMORY_SOURCES) $(MEMORY_HEADERS)
	$(CC) $(WARNINGS) $(HARDENING) $(SANITIZE) -fsanitize=thread -o $@ $(MEMORY_TEST) $(MEMORY_SOURCES) -lpthread

CLANG_CHECKS += memory-clang-check
.PHONY: memory-clang-check
memory-clang-check:
	$(CLANG) $(WARNINGS) $(HARDENING) -O1 -fsyntax-only $(MEMORY_SOURCES)

COVERED += memory
