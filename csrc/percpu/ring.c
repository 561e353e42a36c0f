/* See ring.h. */
#include "ring.h"

#include <errno.h>
#include <string.h>

#include "rooms.h"

#define CONTROL_BYTES 128
#define LEAST_BYTES 4096

enum state { RESERVED = 1, COMMITTED = 2, PAD = 3 };
#define STATE_MASK 7U

/* A record's header: whole length and state in the low half; in the high half its writer's thread, then the payload's length. */
static uint64_t header_of(uint32_t whole, enum state state, uint32_t high)
{
    return (uint64_t)high << 32 | whole | state;
}

static int fail(int *err, int code)
{
    *err = code;
    return -1;
}

int pv_ring_open(struct pv_percpu *areas, pv_percpu_handle control, pv_percpu_handle data, struct pv_ring *out, int *err)
{
    struct pv_percpu_ref first, second;
    uint64_t size;

    if (pv_percpu_get(areas, control, &first, err) || pv_percpu_get(areas, data, &second, err))
        return -1;
    size = ((const struct pv_percpu_slot *)second.limit)->bytes;
    if (((const struct pv_percpu_slot *)first.limit)->bytes != CONTROL_BYTES || size < LEAST_BYTES || size & (size - 1))
        return fail(err, EINVAL);
    *out = (struct pv_ring){{first, second.base - first.base, size}, areas, control, data};
    return 0;
}

int pv_ring_create(struct pv_percpu *areas, uint32_t bytes, struct pv_ring *out, int *err)
{
    pv_percpu_handle control, data;
    int ignored;

    if (bytes < LEAST_BYTES || bytes & (bytes - 1))
        return fail(err, EINVAL);
    if (pv_percpu_alloc(areas, CONTROL_BYTES, &control, err))
        return -1;
    if (pv_percpu_alloc(areas, bytes, &data, err)) {
        pv_percpu_free(areas, control, &ignored);
        return -1;
    }
    return pv_ring_open(areas, control, data, out, err);
}

int pv_ring_free(struct pv_ring *ring, int *err)
{
    int ignored;

    if (pv_percpu_free(ring->areas, ring->control, err))
        return -1;
    pv_percpu_free(ring->areas, ring->data, &ignored);
    return 0;
}

/* ---- writing ----------------------------------------------------------------------------------------------------- */

static uint64_t *word(char *control, unsigned offset)
{
    return (uint64_t *)(control + offset);
}

/* reserve without a sequence, under the area's lock. */
static enum pv_sequence plain_reserve(const struct pv_ring_shape *ring, char *control, uint64_t bytes, uint64_t header,
                                      char **out)
{
    uint64_t head = *word(control, 0), tail = __atomic_load_n(word(control, PV_RING_TAIL), __ATOMIC_ACQUIRE);
    uint64_t at = head & (ring->size - 8), pad = at + bytes > ring->size ? ring->size - at : 0;

    if (head + pad + bytes - tail > ring->size)
        return PV_FULL;
    if (pad)
        *(uint64_t *)(control + ring->data + at) = header_of((uint32_t)pad, PAD, 0);
    *out = control + ring->data + (pad ? 0 : at);
    *(uint64_t *)*out = header;
    __atomic_store_n(word(control, 0), head + pad + bytes, __ATOMIC_RELEASE);
    return PV_DONE;
}

static enum pv_sequence shared_reserve(const struct pv_ring_shape *ring, uint64_t bytes, uint64_t header, char **out)
{
    enum pv_sequence result = PV_SLOW;
    uint32_t area, *lock;
    char *control;

    switch (pv_percpu_slow(ring->control, &control, &area)) {
    case PV_SLOW_AGAIN: return PV_WRAPS; /* any reason to try again */
    case PV_SLOW_FREED: return PV_SLOW;
    case PV_SLOW_SHARED: break;
    }
    lock = pv_shared_lock(ring->control, area);
    result = plain_reserve(ring, control, bytes, header, out);
    pv_shared_unlock(lock);
    return result;
}

/* Fills the ring's end, so that the next record starts at 0. Lost when somebody was quicker, or the thread is on another CPU by now: then
 * that CPU's ring may well have room. */
static enum pv_sequence pad(const struct pv_ring_shape *ring, uint64_t head)
{
    uint64_t room = ring->size - (head & (ring->size - 1));

    return pv_seq_pad(ring, head, head + room, header_of((uint32_t)room, PAD, 0));
}

static void count_dropped(const struct pv_ring_shape *ring)
{
    pv_percpu_add((struct pv_percpu_ref){ring->control.base + PV_RING_DROPPED, ring->control.limit}, 1);
}

/* Tries on each CPU that it is moved to meanwhile; each turn either ends or somebody else has made progress. A pad that finds no room
 * means a full ring, unless the thread was moved. */
static enum pv_sequence reserve(const struct pv_ring_shape *ring, uint64_t bytes, uint64_t header, char **out)
{
    uint64_t head, previous = UINT64_MAX;

    for (;;) {
        enum pv_sequence result = pv_seq_reserve(ring, bytes, header, out, &head);

        if (result == PV_SLOW)
            result = shared_reserve(ring, bytes, header, out);
        else if (result == PV_WRAPS && pad(ring, head) == PV_LOST) {
            if (head == previous)
                return PV_FULL;
            previous = head;
        }
        if (result != PV_WRAPS)
            return result;
    }
}

int pv_ring_reserve(const struct pv_ring *ring, uint32_t bytes, void **payload)
{
    uint64_t whole = ((uint64_t)bytes + PV_RING_HEADER + 7) & ~7ULL;
    enum pv_sequence result = PV_FULL;
    char *record;

    if (whole <= ring->shape.size / 2)
        result = reserve(&ring->shape, whole, header_of((uint32_t)whole, RESERVED, pv_thread_id()), &record);
    if (result == PV_DONE)
        *payload = record + PV_RING_HEADER;
    if (result == PV_FULL)
        count_dropped(&ring->shape);
    return result == PV_DONE ? 1 : result == PV_FULL ? 0 : -1;
}

void pv_ring_commit(void *payload, uint32_t bytes)
{
    uint64_t *header = (uint64_t *)((char *)payload - PV_RING_HEADER);

    __atomic_store_n(header, header_of((uint32_t)*header & ~STATE_MASK, COMMITTED, bytes), __ATOMIC_RELEASE);
}

int pv_ring_put(const struct pv_ring *ring, const void *data, uint32_t bytes)
{
    void *payload;
    int result = pv_ring_reserve(ring, bytes, &payload);

    if (result == 1) {
        memcpy(payload, data, bytes);
        pv_ring_commit(payload, bytes);
    }
    return result;
}

/* ---- reading ----------------------------------------------------------------------------------------------------- */

struct place {
    char *control, *record;
    uint64_t head, tail, header, whole;
};

/* The record at tail; 0: there is none. -1: it cannot be one. */
static int look(const struct pv_ring_shape *ring, char *control, struct place *out)
{
    uint64_t at;

    out->control = control;
    out->head = __atomic_load_n(word(control, 0), __ATOMIC_ACQUIRE);
    out->tail = *word(control, PV_RING_TAIL);
    if (out->head == out->tail)
        return 0;
    at = out->tail & (ring->size - 1);
    out->record = control + ring->data + at;
    if (out->head - out->tail > ring->size || out->tail % 8)
        return -1;
    out->header = __atomic_load_n((uint64_t *)out->record, __ATOMIC_ACQUIRE);
    out->whole = (uint32_t)out->header & ~STATE_MASK;
    return out->whole < 8 || out->whole > out->head - out->tail || at + out->whole > ring->size ? -1 : 1;
}

static void advance(const struct place *place, uint64_t tail)
{
    __atomic_store_n(word(place->control, PV_RING_TAIL), tail, __ATOMIC_RELEASE);
}

/* The oldest committed record; passes over pads and what dead writers left. */
static int find(const struct pv_ring_shape *ring, char *control, struct place *out)
{
    int found;

    while ((found = look(ring, control, out)) > 0) {
        uint32_t state = (uint32_t)out->header & STATE_MASK, high = (uint32_t)(out->header >> 32);

        if (state == COMMITTED)
            return high <= out->whole - PV_RING_HEADER ? 1 : -1;
        if (state == RESERVED && !pv_thread_gone(high))
            return 0;
        if (state != PAD && state != RESERVED)
            return -1;
        if (state == RESERVED)
            __atomic_fetch_add(word(control, PV_RING_ABANDONED), 1, __ATOMIC_RELAXED);
        advance(out, out->tail + out->whole);
    }
    return found;
}

int pv_ring_read(const struct pv_ring *ring, uint32_t area, void *out, size_t room, size_t *bytes, int *err)
{
    char *control = pv_percpu_at(ring->shape.control, area);
    struct place place = {.control = control};
    int found;

    if (!*ring->shape.control.limit)
        return fail(err, ESTALE);
    pv_lock((uint32_t *)(control + PV_RING_LOCK));
    found = find(&ring->shape, control, &place);
    *bytes = found > 0 ? place.header >> 32 : 0;
    if (found < 0) {
        advance(&place, place.head);
        *err = EPROTO;
    } else if (found && *bytes > room) {
        found = fail(err, EMSGSIZE);
    } else if (found) {
        memcpy(out, place.record + PV_RING_HEADER, *bytes);
        advance(&place, place.tail + place.whole);
    }
    pv_unlock((uint32_t *)(control + PV_RING_LOCK));
    return found;
}

int pv_ring_count(const struct pv_ring *ring, struct pv_ring_counts *out, int *err)
{
    struct pv_percpu_ref control = ring->shape.control;

    *out = (struct pv_ring_counts){0};
    if (!*control.limit)
        return fail(err, ESTALE);
    for (int64_t area = pv_percpu_next(ring->areas, control, 0); area >= 0;
         area = pv_percpu_next(ring->areas, control, (uint32_t)area + 1)) {
        char *at = pv_percpu_at(control, (uint32_t)area);
        uint64_t tail = __atomic_load_n(word(at, PV_RING_TAIL), __ATOMIC_ACQUIRE);

        out->dropped += __atomic_load_n(word(at, PV_RING_DROPPED), __ATOMIC_RELAXED);
        out->abandoned += __atomic_load_n(word(at, PV_RING_ABANDONED), __ATOMIC_RELAXED);
        out->waiting_bytes += __atomic_load_n(word(at, 0), __ATOMIC_ACQUIRE) - tail;
    }
    return 0;
}
