# hv-kvm-probe (a guest run under KVM) and the init of the probe's second stage (a real kernel under QEMU with KVM).
KVMPROBE_SOURCES := kvmprobe/main.c kvmprobe/machine.c
KVMPROBE_HEADERS := $(wildcard kvmprobe/*.h)

ifeq ($(shell uname -m),x86_64)
PROGRAMS += $(LIBEXEC)/hv-kvm-probe
endif
$(LIBEXEC)/hv-kvm-probe: $(KVMPROBE_SOURCES) kvmprobe/guest.S $(KVMPROBE_HEADERS)
	$(CC) $(WARNINGS) $(HARDENING) $(CFLAGS) -o $@ $(KVMPROBE_SOURCES) kvmprobe/guest.S

PROGRAMS += $(LIBEXEC)/hv-kvm-probe-init
$(LIBEXEC)/hv-kvm-probe-init: kvmprobe/init.c
	$(CC) $(WARNINGS) -D_GNU_SOURCE -std=gnu11 -Os -fno-stack-protector -fno-asynchronous-unwind-tables -nostdlib -static \
	  -no-pie -Wl,--build-id=none -s -o $@ kvmprobe/init.c

CLANG_CHECKS += kvmprobe-clang-check
.PHONY: kvmprobe-clang-check
kvmprobe-clang-check:
	$(CLANG) $(WARNINGS) $(HARDENING) -O1 -fsyntax-only $(KVMPROBE_SOURCES) kvmprobe/init.c

COVERED += kvmprobe

GCOV_KVMPROBE := $(abspath $(OUT))/gcov/kvmprobe
GCOV_KVMPROBE_OBJECTS := $(patsubst kvmprobe/%.c,$(GCOV_KVMPROBE)/%.o,$(KVMPROBE_SOURCES))

$(GCOV_KVMPROBE)/%.o: kvmprobe/%.c $(KVMPROBE_HEADERS)
	@mkdir -p $(@D)
	$(CC) $(WARNINGS) $(HARDENING) -O0 -g --coverage -c $(abspath $<) -o $@

$(GCOV_KVMPROBE)/hv-kvm-probe: $(GCOV_KVMPROBE_OBJECTS) kvmprobe/guest.S
	$(CC) --coverage -o $@ $^

# What of it runs depends on this machine's KVM; exit code 1 is an answer.
.PHONY: coverage-kvmprobe
coverage-kvmprobe: $(GCOV_KVMPROBE)/hv-kvm-probe
	@rm -f $(GCOV_KVMPROBE)/*.gcda
	$< || [ $$? = 1 ]
	$< 1 || [ $$? = 1 ]
	$< nonsense; [ $$? = 2 ]

coverage: coverage-kvmprobe
