/* What the stats filter counts. */
#ifndef PV_STATS_H
#define PV_STATS_H

#include "../../filter.h"

#define PV_STATS_BUCKETS 40 /* bucket b: values from 2^b to below 2^(b+1); 0 counts in bucket 0 */

struct pv_stats_type {
    uint64_t requests, errors, bytes, latency_ns; /* sums */
    uint64_t latency[PV_STATS_BUCKETS];           /* of ns */
    uint64_t size[PV_STATS_BUCKETS];              /* of bytes */
};

/* Any thread: figures may be of slightly different moments. */
void pv_stats_read(const struct pv_filter *filter, enum pv_io_type type, struct pv_stats_type *out);
/* The upper end of the bucket in which the q-th part (0 < q <= 1) of the values lies; 0: there are none. */
uint64_t pv_stats_quantile(const uint64_t *buckets, double q);

#endif
