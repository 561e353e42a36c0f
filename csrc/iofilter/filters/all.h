/* What the filters share with one another and with classes.c. */
#ifndef PV_FILTERS_ALL_H
#define PV_FILTERS_ALL_H

#include "../filter.h"
#include "../instance.h"

#define PV_ALL_TYPES ((1u << PV_IO_TYPES) - 1)

extern const struct pv_filter_class pv_null_class, pv_template_class, pv_trace_class, pv_stats_class, pv_delay_class,
    pv_error_class, pv_throttle_class, pv_linkedclone_class, pv_snapshot_class,
    pv_encrypt_class, pv_integrity_class, pv_cache_class, pv_mirror_class,
    pv_python_class;

/* Figures: one thread adds (the loop's), any thread reads. */
static inline void pv_add(uint64_t *counter, uint64_t more)
{
    __atomic_store_n(counter, *counter + more, __ATOMIC_RELAXED);
}

static inline uint64_t pv_get(const uint64_t *counter)
{
    return __atomic_load_n(counter, __ATOMIC_RELAXED);
}

/* Appends a figure; what does not fit is left out. */
void pv_figure(struct pv_figure *out, unsigned *count, unsigned max, const char *name, uint64_t value);

extern const char *const pv_io_type_names[PV_IO_TYPES];

#endif
