/* Registration of threads for restartable sequences (rseq(2)), and the kernel's services beside them.
 *
 * Theory of operation
 * -------------------
 * The kernel keeps, for each registered thread, a `struct rseq` up to date: the CPU it runs on, and in it the thread says which
 * sequence it is in. A thread is, in this order:
 *
 *      UNKNOWN --first operation, or pv_rseq_register_thread--> REGISTERED | REFUSED
 *
 * glibc 2.35 and later registers every thread before its first instruction of ours. Elsewhere (an older glibc, or one told
 * glibc.pthread.rseq=0) a thread is registered by its first operation, with a `struct rseq` of this file's own. REFUSED (a kernel or a seccomp
 * filter without rseq, or somebody else's registration that we cannot see) is for good: that thread works by atomic instructions.
 *
 * No state is asked for on the fast path: the CPU number of an unregistered thread is -1 or -2, which is above every limit that a
 * sequence checks anyway.
 *
 * fork(2) hands the registration on; a thread's end needs no care, because its thread-local memory outlives it.
 */
#ifndef PV_RSEQ_H
#define PV_RSEQ_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Where `struct rseq` lies from the thread pointer, the same in every thread. Its fields, as the kernel's ABI has them: */
extern ptrdiff_t pv_rseq_offset __attribute__((visibility("hidden")));
#define PV_RSEQ_CPU_ID 4
#define PV_RSEQ_CS 8
#define PV_RSEQ_SLICE_CTRL 28

/* Sequences that were restarted, in this process; abort handlers count it. */
extern uint64_t pv_percpu_aborts __attribute__((visibility("hidden")));

enum pv_rseq_origin { PV_RSEQ_NONE, PV_RSEQ_LIBC, PV_RSEQ_OWN };

/* Registers the calling thread where nobody has. True when it is registered then. Does not block; any thread. */
bool pv_rseq_register_thread(void);
/* Who registered the calling thread. */
enum pv_rseq_origin pv_rseq_origin(void);

/* Restarts every sequence that any thread of this process is in: when it returns 0, each of them has committed before or will
 * look at memory again. -1 where the kernel has no such barrier (before 5.10). */
int pv_rseq_fence(void);

/* Time-slice extension (Linux 7.0): the kernel lets a thread that asks for it run on for some microseconds instead of preempting
 * it. pv_slice_supported is 0, or why there is none: ENOSYS or EINVAL (the kernel is older or built without), ENOTSUP (switched off),
 * ENXIO (the thread's registration is too short for it: glibc 2.36 registers 32 bytes, of which the kernel wants 33 and more; our own
 * registration is as long as the kernel says that it wants).
 * pv_slice_begin stands behind whatever locks for some instructions (a pool, a worker's queue, a shared area), pv_slice_end where it has
 * unlocked; it gives the CPU back if the kernel had granted more time. A thread's first pv_slice_begin asks whether there is an extension; where
 * there is none, both do nothing. They do not nest: the inner end ends the outer's, too. */
int pv_slice_supported(void);
void pv_slice_begin(void);
void pv_slice_end(void);

#endif
