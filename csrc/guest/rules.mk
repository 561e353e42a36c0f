# init: PID 1 of the guest until the agent takes over; static, so that the initramfs holds nothing but it and kernel modules.
# -no-pie: a static PIE relocates itself at every start, for nothing in a program that starts once.

INIT_FLAGS := -Os -static -no-pie -s $(HARDENING) $(WARNINGS) -Wl,--build-id=none

PROGRAMS += $(GUEST)/init
CLANG_CHECKS += guest-init-clang-check

$(GUEST)/init: guest/init.c common/cleanup.h guest/rules.mk
	$(CC) $(INIT_FLAGS) -o $@ $<

.PHONY: guest-init-clang-check
guest-init-clang-check:
	$(CLANG) -fsyntax-only $(HARDENING) $(WARNINGS) guest/init.c
