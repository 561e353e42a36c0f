/* Per-CPU trace rings: the last so many events of each CPU, for a look at what happened when.
 *
 * Theory of operation
 * -------------------
 * An event is four words, written by one sequence (put4) into the ring of the CPU on which the thread runs: no lock, nothing shared between
 * CPUs. A ring is never full: the newest event takes the oldest one's place. A reader takes a ring's events as they are, then looks how far the
 * writers have come meanwhile, and drops what they may have overwritten.
 *
 *      head = 7                         a reader that saw head 7 before and 9 after keeps events 6 (= 9 - 4 + 1) and above
 *      | 4 | 5 | 6 | 3 -> 7 |           with a ring of 4
 *
 * Times are ticks of the CPU's clock, taken before the sequence; pv_trace_write turns them into nanoseconds of CLOCK_MONOTONIC by the
 * two pairs of both clocks, at creation and at writing, and merges all rings by time.
 *
 * Writing never blocks; any thread and process may write and read at any time.
 */
#ifndef PV_TRACE_H
#define PV_TRACE_H

#include "percpu.h"
#include "trace_point.h"

struct pv_trace {
    struct pv_percpu_ref control; /* head */
    int64_t data;
    uint64_t records;
    struct pv_percpu *areas;
    pv_percpu_handle control_handle, data_handle;
    uint64_t first_ticks, first_ns;
    struct pv_trace_hook hook; /* for pv_trace_use of any module of this process */
};

/* `records`: that each CPU keeps, a power of two, at least 128. Errors of pv_percpu_alloc; EINVAL. */
int pv_trace_create(struct pv_percpu *areas, uint32_t records, struct pv_trace *out, int *err);
/* Nobody may trace meanwhile or after. */
void pv_trace_destroy(struct pv_trace *trace);

/* Writes one event. `start`: its begin in ticks, for COMPLETE; ignored else. */
void pv_trace_put(struct pv_trace *trace, enum pv_trace_phase phase, enum pv_trace_name name, uint64_t argument, uint64_t start);

/* Everything that the rings hold, oldest first, as a Chrome/Perfetto trace (JSON) to `fd`; *events says how many. May run beside
 * writers. ENOMEM, or what write(2) says. */
int pv_trace_write(const struct pv_trace *trace, int fd, uint64_t *events, int *err);

/* Events written since the trace was made, of all CPUs, those overwritten too: pv_percpu_sum's guarantee. */
uint64_t pv_trace_committed(const struct pv_trace *trace);

#endif
