# hv-exec: the guest's static helper that puts a process into a container.
EXEC_SOURCES := $(wildcard exec/*.c)
EXEC_HEADERS := exec/exec.h common/cleanup.h

PROGRAMS += $(GUEST)/hv-exec
CLANG_CHECKS += clang-check-exec

# Static: a dynamic program costs a hundred milliseconds under TCG before main() (docs/agent.md).
$(GUEST)/hv-exec: $(EXEC_SOURCES) $(EXEC_HEADERS) exec/rules.mk
	$(CC) $(CFLAGS) $(HARDENING) $(WARNINGS) -static -o $@ $(EXEC_SOURCES)

.PHONY: clang-check-exec
clang-check-exec:
	$(CLANG) $(HARDENING) $(WARNINGS) -fsyntax-only $(EXEC_SOURCES)
