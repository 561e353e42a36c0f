/* See face.h. */
#include "face.h"

#include <errno.h>
#include <stdlib.h>

#include "ring.h"
#include "trace.h"

struct pv_face_ring {
    struct pv_ring ring;
};

int pv_face_create(uint32_t cpus, struct pv_percpu **out, int *err)
{
    return pv_percpu_create(cpus, out, err);
}

int pv_face_attach(int fd, struct pv_percpu **out, int *err)
{
    return pv_percpu_attach(fd, out, err);
}

void pv_face_destroy(struct pv_percpu *areas)
{
    pv_percpu_destroy(areas);
}

int pv_face_fd(const struct pv_percpu *areas)
{
    return pv_percpu_fd(areas);
}

void pv_face_count(const struct pv_percpu *areas, struct pv_face_counts *out)
{
    struct pv_percpu_stats stats;

    pv_rseq_register_thread();
    pv_percpu_get_stats(areas, &stats);
    *out = (struct pv_face_counts){.cpus = stats.cpus,
                                   .items = stats.items,
                                   .item_bytes = stats.item_bytes,
                                   .memory_bytes = stats.memory_bytes,
                                   .aborts = stats.aborts,
                                   .origin = stats.origin};
}

int pv_face_slice_supported(void)
{
    return pv_slice_supported();
}

/* ---- counters ---------------------------------------------------------------------------------------------------- */

static struct pv_percpu_ref ref_of(const struct pv_face_counter *counter)
{
    return (struct pv_percpu_ref){counter->base, counter->limit};
}

int pv_face_next(const struct pv_percpu *areas, const struct pv_face_counter *counter, uint32_t from)
{
    return (int)pv_percpu_next(areas, ref_of(counter), from);
}

int pv_face_counter_open(struct pv_percpu *areas, uint64_t handle, struct pv_face_counter *out, int *err)
{
    struct pv_percpu_ref ref;

    if (!handle && pv_percpu_alloc(areas, sizeof(uint64_t), &handle, err))
        return -1;
    if (pv_percpu_get(areas, handle, &ref, err))
        return -1;
    *out = (struct pv_face_counter){ref.base, ref.limit, handle};
    return 0;
}

int pv_face_counter_free(struct pv_percpu *areas, const struct pv_face_counter *counter, int *err)
{
    return pv_percpu_free(areas, counter->handle, err);
}

int pv_face_add(const struct pv_face_counter *counter, int64_t n)
{
    return pv_percpu_add(ref_of(counter), n);
}

int pv_face_sum(const struct pv_percpu *areas, const struct pv_face_counter *counter, int64_t *out, int *err)
{
    return pv_percpu_sum(areas, counter->handle, out, err);
}

int64_t pv_face_at(const struct pv_face_counter *counter, uint32_t area)
{
    return __atomic_load_n((int64_t *)pv_percpu_at(ref_of(counter), area), __ATOMIC_ACQUIRE);
}

/* ---- rings ------------------------------------------------------------------------------------------------------- */

int pv_face_ring_open(struct pv_percpu *areas, uint32_t bytes, uint64_t control, uint64_t data, struct pv_face_ring **out, int *err)
{
    struct pv_face_ring *ring = malloc(sizeof *ring);
    int failed;

    if (!ring) {
        *err = ENOMEM;
        return -1;
    }
    failed = bytes ? pv_ring_create(areas, bytes, &ring->ring, err) : pv_ring_open(areas, control, data, &ring->ring, err);
    if (failed) {
        free(ring);
        return -1;
    }
    *out = ring;
    return 0;
}

void pv_face_ring_close(struct pv_face_ring *ring)
{
    free(ring);
}

int pv_face_ring_free(struct pv_face_ring *ring, int *err)
{
    return pv_ring_free(&ring->ring, err);
}

void pv_face_ring_handles(const struct pv_face_ring *ring, uint64_t *control, uint64_t *data)
{
    *control = ring->ring.control;
    *data = ring->ring.data;
}

int pv_face_ring_put(const struct pv_face_ring *ring, const void *data, uint32_t bytes)
{
    return pv_ring_put(&ring->ring, data, bytes);
}

int pv_face_ring_read(const struct pv_face_ring *ring, uint32_t from, void *out, size_t room, size_t *bytes, int *err)
{
    const struct pv_ring *r = &ring->ring;

    for (int64_t area = pv_percpu_next(r->areas, r->shape.control, from); area >= 0;
         area = pv_percpu_next(r->areas, r->shape.control, (uint32_t)area + 1)) {
        int found = pv_ring_read(r, (uint32_t)area, out, room, bytes, err);

        if (found)
            return found > 0 ? (int)area : -2;
    }
    return -1;
}

int pv_face_ring_count(const struct pv_face_ring *ring, struct pv_face_counts *out, int *err)
{
    struct pv_ring_counts counts;

    if (pv_ring_count(&ring->ring, &counts, err))
        return -1;
    pv_face_count(ring->ring.areas, out);
    out->dropped = counts.dropped;
    out->abandoned = counts.abandoned;
    out->waiting_bytes = counts.waiting_bytes;
    return 0;
}

/* ---- traces ------------------------------------------------------------------------------------------------------ */

struct pv_face_trace {
    struct pv_trace trace;
};

int pv_face_trace_open(struct pv_percpu *areas, uint32_t records, struct pv_face_trace **out, int *err)
{
    struct pv_face_trace *trace = malloc(sizeof *trace);

    if (!trace) {
        *err = ENOMEM;
        return -1;
    }
    if (pv_trace_create(areas, records, &trace->trace, err)) {
        free(trace);
        return -1;
    }
    *out = trace;
    return 0;
}

void pv_face_trace_close(struct pv_face_trace *trace)
{
    free(trace);
}

const void *pv_face_trace_hook(const struct pv_face_trace *trace)
{
    return &trace->trace.hook;
}

void pv_face_trace_put(struct pv_face_trace *trace, uint64_t argument)
{
    pv_trace_put(&trace->trace, PV_TRACE_INSTANT, PV_TRACE_OTHER, argument, 0);
}

int pv_face_trace_write(const struct pv_face_trace *trace, int fd, uint64_t *events, int *err)
{
    return pv_trace_write(&trace->trace, fd, events, err);
}

uint64_t pv_face_trace_committed(const struct pv_face_trace *trace)
{
    return pv_trace_committed(&trace->trace);
}
