/* The restartable sequences: vocabulary and pseudo-code, once for every architecture.
 *
 * A sequence is a run of instructions of which only the last changes memory that others look at: the *commit*. When the kernel has
 * preempted the thread, moved it or delivered a signal to it anywhere between `start` and the commit, it resumes it in the *abort
 * handler* instead, and that goes back to `arm`. So no sequence is ever half done, no two sequences of one CPU are ever mixed, and none commits on a CPU
 * whose number it read before it was moved. No lock, no atomic instruction, no memory barrier.
 *
 *      arm      tell the kernel: rseq_cs = {start, commit, abort}      (cleared by the kernel, lazily)
 *      start    cpu  = rseq.cpu_id                                     the CPU that this very sequence runs on
 *               if (cpu >= *limit) -> slow                             not registered (-1), handle freed (0), or a CPU beyond the reservation
 *               room = base + (cpu << PV_PERCPU_SHIFT)                 the alias: the same `base` on every CPU
 *      body     ...                                                    reads, tests, and writes that nobody looks at before the commit
 *      commit   one store (x86: or one read-modify-write without a lock prefix)
 *      abort    aborts++; goto arm                                     in a section of its own, behind the kernel's signature
 *
 * name          body                                                          commit
 * ------------  ------------------------------------------------------------  -------------------------
 * add           (aarch64: v = *room + n)                                      *room += n
 * load                                                                        v = *room (a read: nothing to undo)
 * store                                                                       *room = v
 * cas           seen = *room; if (seen != expected) -> differs                *room = desired
 * push          node->next = *room                                            *room = node
 * pop           node = *room; if (!node) -> empty; next = node->next          *room = next
 * take          node = *room; if (!node) -> empty                             *room = NULL
 * stack_push    n = room[0]; if (n >= capacity) -> full; room[1 + n] = item   room[0] = n + 1
 * stack_pop     n = room[0]; if (!n) -> empty; item = room[n]                 room[0] = n - 1
 * reserve       head, tail = ring; if (head + bytes - tail > size) -> full;   ring.head = head + bytes
 *               at = head & mask; if (at + bytes > size) -> wraps;
 *               data[at] = header
 * pad           if (ring.head != head || new_head - ring.tail > size)         ring.head = new_head
 *               -> lost; data[head & mask] = header
 * put4          head = ring.head; data[head & mask] = four words              ring.head = head + 1
 *
 * `slow`, `differs`, `empty`, `full`, `wraps`, `lost` leave the sequence with memory as it was.
 *
 * Memory order: a sequence is atomic for other sequences of its CPU, and its commit is one aligned store that others see whole. On aarch64 the commits
 * of push, store, reserve and put4 are store-releases and tail is load-acquired, so that who reads them with acquire from another CPU sees
 * what was written before; x86 has that order by itself. add is relaxed.
 *
 * PV_PERCPU_INJECT (tests only): loops so many turns behind each `start`, and (x86-64) behind the look at `limit`, to widen the windows in which
 * a sequence can be interrupted.
 *
 * Source of the terms: US 10331556 (virtual aliases); Linux's rseq ABI, include/uapi/linux/rseq.h.
 */
#ifndef PV_SEQUENCES_H
#define PV_SEQUENCES_H

#include "rseq.h"

#define PV_PERCPU_SHIFT 20 /* log2 of what one CPU's area can hold */

#define PV_STRINGIFY_(x) #x
#define PV_STRINGIFY(x) PV_STRINGIFY_(x)

/* What a sequence needs of its item: the copy in CPU 0's area, and the word that says for how many CPUs there are copies. */
struct pv_percpu_ref {
    char *base;
    const uint32_t *limit;
};

struct pv_percpu_node {
    struct pv_percpu_node *next;
};

/* What reserve, pad and put4 know of a ring; see ring.h. */
struct pv_ring_shape {
    struct pv_percpu_ref control; /* head at 0, tail at PV_RING_TAIL */
    int64_t data;                 /* from control to data, on every CPU */
    uint64_t size;                /* bytes, a power of two */
};
#define PV_RING_TAIL 64

enum pv_sequence { PV_DONE, PV_SLOW, PV_DIFFERS, PV_EMPTY, PV_FULL, PV_WRAPS, PV_LOST };

#if defined(__x86_64__) && !defined(PV_PERCPU_PORTABLE)
#include "sequences_x86_64.h"
#elif defined(__aarch64__) && !defined(PV_PERCPU_PORTABLE)
#include "sequences_aarch64.h"
#else
#include "sequences_none.h"
#endif

#endif
