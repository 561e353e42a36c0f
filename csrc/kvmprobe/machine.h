/* A virtual machine of one vCPU with the probe's guest in its memory. */
#ifndef PV_KVMPROBE_MACHINE_H
#define PV_KVMPROBE_MACHINE_H

#include <linux/kvm.h>
#include <stddef.h>
#include <stdint.h>

/* Errors: -1 and a `struct failure`: what was tried, and its errno (0: no system call failed). */
struct failure {
    int err;
    char what[256];
};

int fail(struct failure *f, int err, const char *format, ...) __attribute__((format(printf, 3, 4)));

struct machine {
    int kvm;
    int vm;
    int vcpu;
    uint8_t *memory; /* GUEST_MEMORY_SIZE bytes */
    struct kvm_run *run;
    size_t run_size;
};

#define MACHINE_NONE ((struct machine){.kvm = -1, .vm = -1, .vcpu = -1})

/* Opens /dev/kvm and builds the machine, ready to run. machine_destroy() in any case, also after a failure. */
int machine_create(struct machine *m, struct failure *f);
void machine_destroy(struct machine *m);

/* Runs the guest until it reports that it is done. *stage is the last stage reached, also on failure.
 * May block for ever: run it in a process that can be killed. */
int machine_run(struct machine *m, volatile int *stage, struct failure *f);

#endif
