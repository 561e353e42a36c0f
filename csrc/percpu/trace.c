/* See trace.h. */
#include "trace.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "common/cleanup.h"
#include "rooms.h"

#define CONTROL_BYTES 64
#define RECORD_BYTES 32

/* A record: begin in ticks, ticks it took, {thread, name, phase}, argument. */
struct record {
    uint64_t ticks, took, what, argument;
};

struct event {
    struct record record;
    uint32_t area;
};

static const char *const NAMES[PV_TRACE_NAMES] = {"other", "fault", "vsock", "block", "filter", "preempted"};

static uint64_t monotonic_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

static void put_by_hook(void *context, enum pv_trace_phase phase, enum pv_trace_name name, uint64_t argument, uint64_t start)
{
    pv_trace_put(context, phase, name, argument, start);
}

int pv_trace_create(struct pv_percpu *areas, uint32_t records, struct pv_trace *out, int *err)
{
    struct pv_percpu_ref data;
    int ignored;

    if (records < 4096 / RECORD_BYTES || records & (records - 1) || records > PV_PERCPU_MAX_BYTES / RECORD_BYTES) {
        *err = EINVAL;
        return -1;
    }
    *out = (struct pv_trace){.records = records, .areas = areas, .hook = {put_by_hook, out}};
    if (pv_percpu_alloc(areas, CONTROL_BYTES, &out->control_handle, err))
        return -1;
    if (pv_percpu_alloc(areas, records * RECORD_BYTES, &out->data_handle, err)) {
        pv_percpu_free(areas, out->control_handle, &ignored);
        return -1;
    }
    if (pv_percpu_get(areas, out->control_handle, &out->control, err) || pv_percpu_get(areas, out->data_handle, &data, err))
        return -1;
    out->data = data.base - out->control.base;
    out->first_ticks = pv_trace_ticks();
    out->first_ns = monotonic_ns();
    return 0;
}

void pv_trace_destroy(struct pv_trace *trace)
{
    int ignored;

    pv_percpu_free(trace->areas, trace->control_handle, &ignored);
    pv_percpu_free(trace->areas, trace->data_handle, &ignored);
}

uint64_t pv_trace_committed(const struct pv_trace *trace)
{
    int64_t sum;
    int ignored;

    return pv_percpu_sum(trace->areas, trace->control_handle, &sum, &ignored) ? 0 : (uint64_t)sum; /* the heads */
}

static void put_slowly(struct pv_trace *trace, const uint64_t words[4])
{
    uint32_t area, *lock;
    uint64_t *control, *record;
    char *room;

    switch (pv_percpu_slow(trace->control, &room, &area)) {
    case PV_SLOW_AGAIN: pv_seq_put4(trace->control, trace->data, trace->records, words); return;
    case PV_SLOW_FREED: return;
    case PV_SLOW_SHARED: break;
    }
    control = (uint64_t *)room;
    lock = pv_shared_lock(trace->control, area);
    record = (uint64_t *)(room + trace->data) + (*control & (trace->records - 1)) * 4;
    for (int w = 0; w < 4; w++)
        __atomic_store_n(&record[w], words[w], __ATOMIC_RELEASE); /* behind the head before it */
    __atomic_store_n(control, *control + 1, __ATOMIC_RELEASE);
    pv_shared_unlock(lock);
}

void pv_trace_put(struct pv_trace *trace, enum pv_trace_phase phase, enum pv_trace_name name, uint64_t argument, uint64_t start)
{
    uint64_t now = pv_trace_ticks(), begin = phase == PV_TRACE_COMPLETE ? start : now;
    uint64_t words[4] = {begin, now - begin, (uint64_t)pv_thread_id() << 32 | (uint64_t)name << 8 | phase, argument};

    if (__builtin_expect(pv_seq_put4(trace->control, trace->data, trace->records, words) != PV_DONE, 0))
        put_slowly(trace, words);
}

/* ---- reading ----------------------------------------------------------------------------------------------------- */

/* Appends what one area's ring holds and nobody can have overwritten meanwhile. */
static size_t take(const struct pv_trace *trace, uint32_t area, struct event *out)
{
    char *control = pv_percpu_at(trace->control, area);
    const struct record *records = (const struct record *)(control + trace->data);
    uint64_t head = __atomic_load_n((uint64_t *)control, __ATOMIC_ACQUIRE), after, kept = 0;
    uint64_t first = head > trace->records ? head - trace->records : 0;

    for (uint64_t i = first; i < head; i++) {
        const uint64_t *from = (const uint64_t *)&records[i & (trace->records - 1)];
        uint64_t *to = (uint64_t *)&out[i - first].record;

        for (int w = 0; w < 4; w++)
            to[w] = __atomic_load_n(&from[w], __ATOMIC_ACQUIRE); /* so that head is read again behind them */
        out[i - first].area = area;
    }
    after = __atomic_load_n((uint64_t *)control, __ATOMIC_RELAXED);
    for (uint64_t i = first; i < head; i++) /* the place after the newest may be half written */
        if (i + trace->records > after)
            out[kept++] = out[i - first];
    return kept;
}

static int by_time(const void *left, const void *right)
{
    uint64_t a = ((const struct event *)left)->record.ticks, b = ((const struct event *)right)->record.ticks;

    return a < b ? -1 : a > b;
}

/* Nanoseconds of CLOCK_MONOTONIC for ticks, by the line through two pairs of both. */
struct scale {
    uint64_t ticks, ns;
    double ns_a_tick;
};

static double microseconds(const struct scale *scale, uint64_t ticks)
{
    return ((double)scale->ns + (double)(int64_t)(ticks - scale->ticks) * scale->ns_a_tick) / 1000;
}

static void print_event(FILE *out, const struct scale *scale, const struct event *event, int pid, uint32_t cpus)
{
    const struct record *r = &event->record;
    uint32_t name = (uint32_t)(r->what >> 8 & 0xff), phase = (uint32_t)(r->what & 0xff);

    fprintf(out, "{\"name\":\"%s\",\"ph\":\"%s\",\"pid\":%d,\"tid\":%u,\"ts\":%.3f,", name < PV_TRACE_NAMES ? NAMES[name] : "?",
            phase == PV_TRACE_COMPLETE ? "X" : "i", pid, (uint32_t)(r->what >> 32), microseconds(scale, r->ticks));
    if (phase == PV_TRACE_COMPLETE)
        fprintf(out, "\"dur\":%.3f,", (double)r->took * scale->ns_a_tick / 1000);
    else
        fprintf(out, "\"s\":\"t\",");
    fprintf(out, "\"args\":{\"cpu\":%u,\"argument\":%" PRIu64 "}}", event->area % cpus, r->argument);
}

static int print_all(const struct pv_trace *trace, int fd, const struct event *events, size_t count, int *err)
{
    uint64_t ticks = pv_trace_ticks() - trace->first_ticks;
    struct scale scale = {trace->first_ticks, trace->first_ns, (double)(monotonic_ns() - trace->first_ns) / (double)(ticks ? ticks : 1)};
    int own = dup(fd), failed;
    FILE *out = own < 0 ? NULL : fdopen(own, "w");

    if (!out) {
        *err = errno;
        if (own >= 0)
            close(own);
        return -1;
    }
    fputs("{\"displayTimeUnit\":\"ns\",\"traceEvents\":[\n", out);
    for (size_t i = 0; i < count; i++) {
        print_event(out, &scale, &events[i], (int)getpid(), pv_percpu_cpus(trace->areas));
        fputs(i + 1 < count ? ",\n" : "\n", out);
    }
    fputs("]}\n", out);
    failed = ferror(out);
    if (fclose(out) || failed) {
        *err = errno ? errno : EIO;
        return -1;
    }
    return 0;
}

int pv_trace_write(const struct pv_trace *trace, int fd, uint64_t *events, int *err)
{
    cleanup_free struct event *all = NULL;
    size_t count = 0;

    for (int64_t area = pv_percpu_next(trace->areas, trace->control, 0); area >= 0;
         area = pv_percpu_next(trace->areas, trace->control, (uint32_t)area + 1)) {
        struct event *more = reallocarray(all, count + trace->records, sizeof *all);

        if (!more) {
            *err = ENOMEM;
            return -1;
        }
        all = more;
        count += take(trace, (uint32_t)area, all + count);
    }
    if (count)
        qsort(all, count, sizeof *all, by_time);
    *events = count;
    return print_all(trace, fd, all, count, err);
}
