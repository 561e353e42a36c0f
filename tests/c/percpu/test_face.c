/* The functions that Python calls, without Python: each does what it says, and says no to nonsense. */
#include <sys/mman.h>

#include "check.h"
#include "percpu/face.h"

static void test_counters(struct pv_percpu *areas)
{
    struct pv_face_counter counter, again;
    struct pv_face_counts counts;
    int64_t sum;
    int area, err = 0;

    CHECK(!pv_face_counter_open(areas, 0, &counter, &err) && !pv_face_counter_open(areas, counter.handle, &again, &err));
    CHECK(!pv_face_add(&counter, 5) && !pv_face_add(&again, -2));
    CHECK(!pv_face_sum(areas, &counter, &sum, &err) && sum == 3);
    area = pv_face_next(areas, &counter, 0);
    CHECK(area >= 0);
    for (sum = 0; area >= 0; area = pv_face_next(areas, &counter, (uint32_t)area + 1))
        sum += pv_face_at(&counter, (uint32_t)area);
    pv_face_count(areas, &counts);
    CHECK(sum == 3 && counts.items == 1 && counts.item_bytes == 8 && counts.memory_bytes);
    CHECK(!pv_face_counter_free(areas, &counter, &err));
    CHECK(pv_face_add(&again, 1) == -1 && pv_face_sum(areas, &again, &sum, &err) == -1 && err == ESTALE);
    CHECK(pv_face_counter_open(areas, counter.handle, &again, &err) == -1 && err == ESTALE);
    CHECK(pv_face_counter_free(areas, &counter, &err) == -1 && err == ESTALE);
}

static void test_rings(struct pv_percpu *areas)
{
    struct pv_face_ring *ring, *again;
    struct pv_face_counts counts;
    uint64_t control, data;
    char out[16];
    size_t bytes;
    int err = 0;

    CHECK(!pv_face_ring_open(areas, 4096, 0, 0, &ring, &err));
    pv_face_ring_handles(ring, &control, &data);
    CHECK(!pv_face_ring_open(areas, 0, control, data, &again, &err));
    CHECK(pv_face_ring_put(ring, "hello", 5) == 1 && pv_face_ring_put(ring, out, 4000) == 0);
    CHECK(pv_face_ring_read(again, 0, out, 4, &bytes, &err) == -2 && err == EMSGSIZE && bytes == 5);
    CHECK(pv_face_ring_read(again, 0, out, sizeof out, &bytes, &err) >= 0 && bytes == 5 && !memcmp(out, "hello", 5));
    CHECK(pv_face_ring_read(again, 0, out, sizeof out, &bytes, &err) == -1);
    CHECK(!pv_face_ring_count(ring, &counts, &err) && counts.dropped == 1 && !counts.waiting_bytes);
    CHECK(!pv_face_ring_free(ring, &err) && pv_face_ring_put(again, "x", 1) == -1);
    CHECK(pv_face_ring_count(again, &counts, &err) == -1 && err == ESTALE);
    pv_face_ring_close(ring);
    pv_face_ring_close(again);
    CHECK(pv_face_ring_open(areas, 100, 0, 0, &ring, &err) == -1 && err == EINVAL);
    CHECK(pv_face_ring_open(areas, 0, control, data, &ring, &err) == -1 && err == ESTALE);
}

static void test_traces(struct pv_percpu *areas)
{
    int err = 0, file = memfd_create("trace", MFD_CLOEXEC);
    struct pv_face_trace *trace;
    uint64_t events;

    CHECK(!pv_face_trace_open(areas, 128, &trace, &err) && pv_face_trace_hook(trace));
    pv_face_trace_put(trace, 1);
    CHECK(!pv_face_trace_write(trace, file, &events, &err) && events == 1 && lseek(file, 0, SEEK_END) > 0);
    CHECK(pv_face_trace_write(trace, -1, &events, &err) == -1 && err == EBADF);
    pv_face_trace_close(trace);
    CHECK(pv_face_trace_open(areas, 3, &trace, &err) == -1 && err == EINVAL);
    close(file);
}

int main(void)
{
    struct pv_percpu *areas, *second;
    int err = 0, why;

    CHECK(!pv_face_create(0, &areas, &err) && pv_face_fd(areas) >= 0);
    CHECK(!pv_face_attach(pv_face_fd(areas), &second, &err));
    CHECK(pv_face_create(1 << 20, &second, &err) == -1 && err == EINVAL);
    pv_face_destroy(second);
    why = pv_face_slice_supported();
    printf("time-slice extension: %s\n", why ? strerror(why) : "yes");
    test_counters(areas);
    test_rings(areas);
    test_traces(areas);
    pv_face_destroy(areas);
    return 0;
}
