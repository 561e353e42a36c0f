/* What the trace filter keeps of a request. */
#ifndef PV_TRACE_H
#define PV_TRACE_H

#include "../../filter.h"

struct pv_trace_record {
    uint64_t number;   /* from 1; requests are numbered as they end */
    uint64_t start_ns; /* CLOCK_MONOTONIC */
    uint64_t latency_ns, offset, length;
    uint32_t error; /* positive errno, or 0 */
    uint8_t type;   /* PV_IO_* */
    uint8_t flags;
    uint16_t unused;
};

/* Records after *cursor (begin with 0), oldest first; at most max. *cursor moves behind the last. Those that were overwritten before they
 * were read are skipped (their numbers are missing). Any thread, without a lock: a record that changes while it is read is not returned. */
unsigned pv_trace_read(const struct pv_filter *filter, uint64_t *cursor, struct pv_trace_record *out, unsigned max);

#endif
