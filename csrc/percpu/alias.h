/* A MODEL of true virtual aliases (US 10331556), not a mechanism that anything here runs on.
 *
 * In the patent every CPU maps its own private data area at the same virtual address, so that one address, held in a register by a context that is
 * moved, means the new CPU's area with the very next instruction. A user process cannot give its threads different page tables. What can
 * be had without the kernel's help is this model:
 *
 *      physical CPU            a process, forked from one parent, one thread, bound to a CPU
 *      its private area        a page of a shared file, mapped by each process at the same fixed address
 *      a context               a stack in memory that all of them share, and nothing thread-local of libc
 *      preemption, migration   a signal at any instruction; the handler leaves the context on the shared queue, and any process takes it on
 *
 * A context takes the address once. Then it adds through it, one instruction without a lock prefix a time, while it is moved. That instruction
 * always finds the area of the process that executes it, and no other process ever writes there: nothing can be lost, without rseq, without atomic
 * instructions, and without knowing the CPU's number. A sequence that is interrupted in its middle just goes on: where rseq restarts, the alias has no need to.
 *
 * Theory of operation: each process runs a scheduler on its own stack, with the signal blocked. It takes a context from the queue and switches
 * to it; a context comes back by its end, or inside the handler, from where it will be continued, by whichever process, back through
 * the handler's return (which restores all registers and unblocks the signal).
 */
#ifndef PV_ALIAS_H
#define PV_ALIAS_H

#include <stdint.h>

#define PV_ALIAS_CPUS 16
#define PV_ALIAS_CONTEXTS 32

struct pv_alias_plan {
    unsigned cpus, contexts;
    uint64_t adds; /* of each context */
};

struct pv_alias_result {
    uint64_t area[PV_ALIAS_CPUS]; /* what each area has counted at the end */
    uint64_t moves;               /* times that a context found itself in another process's area */
    uint64_t preemptions;
    uint64_t address; /* that every context held all the time; 0: they differ */
};

/* Runs the model to its end; forks, and waits for all it forked. EINVAL, ENOMEM, or EIO: a process died. */
int pv_alias_run(const struct pv_alias_plan *plan, struct pv_alias_result *out, int *err);

#endif
