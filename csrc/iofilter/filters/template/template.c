/* A filter to copy: docs/filters/writing.md goes through it line by line.
 *
 * It counts requests whose offset is a multiple of `stride`, and the bytes that came back without an error. Nobody needs that; all parts
 * of a filter are here, each as small as it can be.
 */
#include "../all.h"

#include <stdio.h>
#include <string.h>

/* The filter's own struct: its first member is the framework's. It comes zeroed, and it is freed by the framework. */
struct template {
    struct pv_filter filter;
    uint64_t stride;                  /* bytes */
    uint64_t matched, bytes;          /* touched by the loop's thread, read by any: relaxed atomics */
};

static const char *const names[] = {"stride", NULL};

/* Reads the settings; changes nothing unless all of them are good: it serves `open` and `set`. */
static int template_open(struct pv_filter *filter, const struct pv_settings *settings, struct pv_fail *fail)
{
    struct template *self = (struct template *)filter;

    if (pv_settings_known(settings, names, fail))
        return -1;
    return pv_setting_size(settings, "stride", 1 << 20, PV_SECTOR, 1ull << 40, &self->stride, fail);
}

/* On the loop, for each request of the types below. Exactly one of: pass, end, redirect, keep. */
static void template_request(struct pv_filter *filter, struct pv_io *io)
{
    struct template *self = (struct template *)filter;

    if (io->offset % self->stride == 0)
        pv_add(&self->matched, 1);
    pv_io_pass(filter, io);
}

/* On the loop, when a request that was passed on comes back. */
static void template_completed(struct pv_filter *filter, struct pv_io *io)
{
    struct template *self = (struct template *)filter;

    if (!io->error)
        pv_add(&self->bytes, io->length);
}

/* Any thread. */
static unsigned template_figures(const struct pv_filter *filter, struct pv_figure *out, unsigned max)
{
    const struct template *self = (const struct template *)filter;
    unsigned count = 0;

    pv_figure(out, &count, max, "matched", pv_get(&self->matched));
    pv_figure(out, &count, max, "bytes", pv_get(&self->bytes));
    return count;
}

const struct pv_filter_class pv_template_class = {
    .name = "template",
    .order = PV_INSPECTION,
    .size = sizeof(struct template),
    .types = 1 << PV_IO_READ | 1 << PV_IO_WRITE, /* others pass by without a call */
    .open = template_open,
    .request = template_request,
    .completed = template_completed,
    .set = template_open,
    .figures = template_figures,
};
