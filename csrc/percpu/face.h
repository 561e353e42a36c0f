/* What Python sees of the per-CPU areas: functions instead of inlined sequences. See percpu.h, ring.h for what each promises. */
#ifndef PV_PERCPU_FACE_H
#define PV_PERCPU_FACE_H

#include <stddef.h>
#include <stdint.h>

struct pv_percpu;
struct pv_face_ring;

struct pv_face_counter {
    char *base;
    const uint32_t *limit;
    uint64_t handle;
};

struct pv_face_counts {
    uint64_t cpus, items, item_bytes, memory_bytes, aborts, origin;
    uint64_t dropped, abandoned, waiting_bytes; /* of a ring */
};

int pv_face_create(uint32_t cpus, struct pv_percpu **out, int *err);
int pv_face_attach(int fd, struct pv_percpu **out, int *err);
void pv_face_destroy(struct pv_percpu *areas);
int pv_face_fd(const struct pv_percpu *areas);
void pv_face_count(const struct pv_percpu *areas, struct pv_face_counts *out);
int pv_face_slice_supported(void);
int pv_face_next(const struct pv_percpu *areas, const struct pv_face_counter *counter, uint32_t from);

/* `handle` 0: a new one. */
int pv_face_counter_open(struct pv_percpu *areas, uint64_t handle, struct pv_face_counter *out, int *err);
int pv_face_counter_free(struct pv_percpu *areas, const struct pv_face_counter *counter, int *err);
int pv_face_add(const struct pv_face_counter *counter, int64_t n);
int pv_face_sum(const struct pv_percpu *areas, const struct pv_face_counter *counter, int64_t *out, int *err);
int64_t pv_face_at(const struct pv_face_counter *counter, uint32_t area);

/* `bytes` above 0: a new one; else the one with these handles. */
int pv_face_ring_open(struct pv_percpu *areas, uint32_t bytes, uint64_t control, uint64_t data, struct pv_face_ring **out, int *err);
void pv_face_ring_close(struct pv_face_ring *ring);
int pv_face_ring_free(struct pv_face_ring *ring, int *err);
void pv_face_ring_handles(const struct pv_face_ring *ring, uint64_t *control, uint64_t *data);
int pv_face_ring_put(const struct pv_face_ring *ring, const void *data, uint32_t bytes);
/* The oldest record of the first area from `from` on that has one: its area, -1 when none has, -2 and *err. */
int pv_face_ring_read(const struct pv_face_ring *ring, uint32_t from, void *out, size_t room, size_t *bytes, int *err);
/* A trace (trace.h). `hook`: what other modules' pv_..._trace take. Closing leaves its items in the areas, which may have gone before. */
struct pv_face_trace;
int pv_face_trace_open(struct pv_percpu *areas, uint32_t records, struct pv_face_trace **out, int *err);
void pv_face_trace_close(struct pv_face_trace *trace);
const void *pv_face_trace_hook(const struct pv_face_trace *trace);
void pv_face_trace_put(struct pv_face_trace *trace, uint64_t argument);
int pv_face_trace_write(const struct pv_face_trace *trace, int fd, uint64_t *events, int *err);
uint64_t pv_face_trace_committed(const struct pv_face_trace *trace);

int pv_face_ring_count(const struct pv_face_ring *ring, struct pv_face_counts *out, int *err);

#endif
