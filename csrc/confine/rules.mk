# hv-confine, static: it starts in half the time, and needs nothing of the root that it leaves.
CONFINE_SOURCES := confine/main.c confine/options.c confine/view.c confine/privileges.c confine/filter.c
CONFINE_HEADERS := $(wildcard confine/*.h) common/cleanup.h
CONFINE_TEST := $(TESTS_DIR)/confine

PROGRAMS += $(LIBEXEC)/hv-confine
$(LIBEXEC)/hv-confine: $(CONFINE_SOURCES) $(CONFINE_HEADERS)
	$(CC) $(WARNINGS) $(HARDENING) $(CFLAGS) -static -o $@ $(CONFINE_SOURCES)

CLANG_CHECKS += confine-clang-check
.PHONY: confine-clang-check
confine-clang-check:
	$(CLANG) $(WARNINGS) $(HARDENING) -O1 -fsyntax-only $(CONFINE_SOURCES)

TESTS += $(OUT)/test-confine
$(OUT)/test-confine: $(CONFINE_TEST)/test_options.c confine/options.c $(CONFINE_HEADERS)
	$(CC) $(WARNINGS) $(HARDENING) $(SANITIZE) -fsanitize=address,undefined -I. -o $@ \
	  $(CONFINE_TEST)/test_options.c confine/options.c

COVERED += confine

# The launcher itself, as it is shipped.
TESTS += $(OUT)/test-confine-launch
$(OUT)/test-confine-launch: $(CONFINE_TEST)/launch.sh $(LIBEXEC)/hv-confine
	@printf '%s\n' '#!/bin/sh' 'dir=$$(mktemp -d) && chmod 777 $$dir' \
	  'sh $(abspath $(CONFINE_TEST))/launch.sh $(abspath $(LIBEXEC))/hv-confine $$dir; code=$$?' \
	  'rm -r $$dir; exit $$code' >$@
	@chmod +x $@

# gcov writes its data before execve, as the VM's user and inside the private root: so that folder is open and shown.
GCOV_CONFINE := $(abspath $(OUT))/gcov/confine
GCOV_CONFINE_OBJECTS := $(patsubst confine/%.c,$(GCOV_CONFINE)/%.o,$(CONFINE_SOURCES))

$(GCOV_CONFINE)/%.o: confine/%.c $(CONFINE_HEADERS)
	@mkdir -p $(@D)
	$(CC) $(WARNINGS) $(HARDENING) -O0 -g --coverage -c $(abspath $<) -o $@

$(GCOV_CONFINE)/hv-confine: $(GCOV_CONFINE_OBJECTS)
	$(CC) --coverage -o $@ $^

$(GCOV_CONFINE)/test-confine: $(CONFINE_TEST)/test_options.c $(GCOV_CONFINE)/options.o
	$(CC) $(HARDENING) -I. --coverage -o $@ $^

.PHONY: coverage-confine
coverage-confine: $(GCOV_CONFINE)/hv-confine $(GCOV_CONFINE)/test-confine
	@rm -f $(GCOV_CONFINE)/*.gcda && chmod 777 $(GCOV_CONFINE)
	$(GCOV_CONFINE)/test-confine
	@chmod 666 $(GCOV_CONFINE)/*.gcda
	@umask 0; sh $(CONFINE_TEST)/launch.sh $(GCOV_CONFINE)/hv-confine $(GCOV_CONFINE)

coverage: coverage-confine
