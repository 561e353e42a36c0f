/* Keeps the last requests in a ring.
 *
 * Theory of operation: the ring has one writer, the loop's thread, and any number of readers, who never hold it up. A record's number is
 * set to 0, then its fields are written, then its number: a reader that sees the same number, not 0, before and after its copy has a whole
 * record (a sequence lock with the request's number as the sequence).
 */
#include "trace.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "../all.h"

struct trace {
    struct pv_filter filter;
    struct pv_trace_record *ring;
    uint64_t size; /* records: a power of 2 */
    uint64_t last; /* number of the newest record */
    uint64_t min_ns;
};

static const char *const names[] = {"records", "slower_us", NULL};

static int read_settings(struct trace *self, const struct pv_settings *settings, uint64_t *records, struct pv_fail *fail)
{
    uint64_t slower;

    if (pv_settings_known(settings, names, fail))
        return -1;
    if (pv_setting_size(settings, "records", 1024, 16, 1 << 20, records, fail))
        return -1;
    if (pv_setting_size(settings, "slower_us", 0, 0, 1u << 30, &slower, fail))
        return -1;
    if (*records & (*records - 1))
        return pv_fail(fail, EINVAL, "records=%llu: must be a power of 2", (unsigned long long)*records);
    self->min_ns = slower * 1000;
    return 0;
}

static int trace_open(struct pv_filter *filter, const struct pv_settings *settings, struct pv_fail *fail)
{
    struct trace *self = (struct trace *)filter;

    if (read_settings(self, settings, &self->size, fail))
        return -1;
    self->ring = calloc(self->size, sizeof *self->ring);
    if (!self->ring)
        return pv_fail(fail, ENOMEM, "no memory for %llu records", (unsigned long long)self->size);
    return 0;
}

static void trace_close(struct pv_filter *filter)
{
    free(((struct trace *)filter)->ring);
}

static int trace_set(struct pv_filter *filter, const struct pv_settings *settings, struct pv_fail *fail)
{
    struct trace *self = (struct trace *)filter, asked = *self;
    uint64_t records;

    if (read_settings(&asked, settings, &records, fail))
        return -1;
    if (records != self->size)
        return pv_fail(fail, EBUSY, "records cannot be changed while the filter is attached: detach and attach it");
    self->min_ns = asked.min_ns;
    return 0;
}

static void trace_request(struct pv_filter *filter, struct pv_io *io)
{
    io->frames[filter->at].word = pv_loop_clock_ns();
    pv_io_pass(filter, io);
}

static void trace_completed(struct pv_filter *filter, struct pv_io *io)
{
    struct trace *self = (struct trace *)filter;
    uint64_t start = io->frames[filter->at].word, latency = pv_loop_clock_ns() - start;
    struct pv_trace_record *slot = &self->ring[(self->last + 1) & (self->size - 1)];

    if (latency < self->min_ns)
        return;
    __atomic_store_n(&slot->number, 0, __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_RELEASE);
    __atomic_store_n(&slot->start_ns, start, __ATOMIC_RELAXED);
    __atomic_store_n(&slot->latency_ns, latency, __ATOMIC_RELAXED);
    __atomic_store_n(&slot->offset, io->offset, __ATOMIC_RELAXED);
    __atomic_store_n(&slot->length, io->length, __ATOMIC_RELAXED);
    __atomic_store_n(&slot->error, (uint32_t)io->error, __ATOMIC_RELAXED);
    __atomic_store_n(&slot->type, (uint8_t)io->type, __ATOMIC_RELAXED);
    __atomic_store_n(&slot->flags, (uint8_t)io->flags, __ATOMIC_RELAXED);
    __atomic_store_n(&slot->number, self->last + 1, __ATOMIC_RELEASE);
    __atomic_store_n(&self->last, self->last + 1, __ATOMIC_RELEASE);
}

static bool copy_record(const struct pv_trace_record *slot, uint64_t number, struct pv_trace_record *out)
{
    if (__atomic_load_n(&slot->number, __ATOMIC_ACQUIRE) != number)
        return false;
    out->number = number;
    out->start_ns = __atomic_load_n(&slot->start_ns, __ATOMIC_RELAXED);
    out->latency_ns = __atomic_load_n(&slot->latency_ns, __ATOMIC_RELAXED);
    out->offset = __atomic_load_n(&slot->offset, __ATOMIC_RELAXED);
    out->length = __atomic_load_n(&slot->length, __ATOMIC_RELAXED);
    out->error = __atomic_load_n(&slot->error, __ATOMIC_RELAXED);
    out->type = __atomic_load_n(&slot->type, __ATOMIC_RELAXED);
    out->flags = __atomic_load_n(&slot->flags, __ATOMIC_RELAXED);
    out->unused = 0;
    __atomic_thread_fence(__ATOMIC_ACQUIRE);
    return __atomic_load_n(&slot->number, __ATOMIC_RELAXED) == number;
}

unsigned pv_trace_read(const struct pv_filter *filter, uint64_t *cursor, struct pv_trace_record *out, unsigned max)
{
    const struct trace *self = (const struct trace *)filter;
    uint64_t last = __atomic_load_n(&self->last, __ATOMIC_ACQUIRE);
    uint64_t next = *cursor + 1;
    unsigned count = 0;

    if (last >= self->size && next <= last - self->size)
        next = last - self->size + 1;
    for (; next <= last && count < max; next++) {
        *cursor = next;
        if (copy_record(&self->ring[next & (self->size - 1)], next, &out[count]))
            count++;
    }
    return count;
}

static unsigned trace_figures(const struct pv_filter *filter, struct pv_figure *out, unsigned max)
{
    unsigned count = 0;

    pv_figure(out, &count, max, "traced", pv_get(&((const struct trace *)filter)->last));
    return count;
}

const struct pv_filter_class pv_trace_class = {
    .name = "trace",
    .order = PV_ANYWHERE,
    .size = sizeof(struct trace),
    .types = PV_ALL_TYPES,
    .open = trace_open,
    .close = trace_close,
    .request = trace_request,
    .completed = trace_completed,
    .set = trace_set,
    .figures = trace_figures,
};
