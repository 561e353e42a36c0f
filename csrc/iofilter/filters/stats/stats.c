/* Histograms of latency and size by request type, in powers of two: two additions a request, no memory but the table. */
#include "stats.h"

#include <stdio.h>
#include <string.h>

#include "../all.h"

struct stats {
    struct pv_filter filter;
    struct pv_stats_type types[PV_IO_TYPES]; /* one writer (the loop), any reader: relaxed atomics */
};

static const char *const names[] = {NULL};

static int stats_open(struct pv_filter *filter, const struct pv_settings *settings, struct pv_fail *fail)
{
    (void)filter;
    return pv_settings_known(settings, names, fail);
}

static void stats_request(struct pv_filter *filter, struct pv_io *io)
{
    io->frames[filter->at].word = pv_loop_clock_ns();
    pv_io_pass(filter, io);
}

static unsigned bucket(uint64_t value)
{
    unsigned at = value ? 63 - (unsigned)__builtin_clzll(value) : 0;

    return at < PV_STATS_BUCKETS ? at : PV_STATS_BUCKETS - 1;
}

static void stats_completed(struct pv_filter *filter, struct pv_io *io)
{
    struct pv_stats_type *of = &((struct stats *)filter)->types[io->type];
    uint64_t latency = pv_loop_clock_ns() - io->frames[filter->at].word;

    pv_add(&of->requests, 1);
    pv_add(&of->errors, io->error != 0);
    pv_add(&of->bytes, io->error ? 0 : io->length);
    pv_add(&of->latency_ns, latency);
    pv_add(&of->latency[bucket(latency)], 1);
    pv_add(&of->size[bucket(io->length)], 1);
}

void pv_stats_read(const struct pv_filter *filter, enum pv_io_type type, struct pv_stats_type *out)
{
    const struct pv_stats_type *of = &((const struct stats *)filter)->types[type];

    out->requests = pv_get(&of->requests);
    out->errors = pv_get(&of->errors);
    out->bytes = pv_get(&of->bytes);
    out->latency_ns = pv_get(&of->latency_ns);
    for (unsigned i = 0; i < PV_STATS_BUCKETS; i++) {
        out->latency[i] = pv_get(&of->latency[i]);
        out->size[i] = pv_get(&of->size[i]);
    }
}

uint64_t pv_stats_quantile(const uint64_t *buckets, double q)
{
    uint64_t total = 0, seen = 0;

    for (unsigned i = 0; i < PV_STATS_BUCKETS; i++)
        total += buckets[i];
    if (!total)
        return 0;
    for (unsigned i = 0; i < PV_STATS_BUCKETS; i++) {
        seen += buckets[i];
        if ((double)seen >= q * (double)total)
            return 2ull << i;
    }
    return 2ull << (PV_STATS_BUCKETS - 1);
}

static void figures_of(const struct pv_stats_type *of, const char *type, struct pv_figure *out, unsigned *count, unsigned max)
{
    const struct {
        const char *what;
        uint64_t value;
    } rows[] = {
        {"requests", of->requests},
        {"errors", of->errors},
        {"bytes", of->bytes},
        {"latency_sum_ns", of->latency_ns},
        {"latency_p50_ns", pv_stats_quantile(of->latency, 0.5)},
        {"latency_p99_ns", pv_stats_quantile(of->latency, 0.99)},
    };

    for (unsigned i = 0; i < sizeof rows / sizeof *rows; i++) {
        char name[32];

        snprintf(name, sizeof name, "%s_%s", type, rows[i].what);
        pv_figure(out, count, max, name, rows[i].value);
    }
}

/* Of the types that there were requests of. */
static unsigned stats_figures(const struct pv_filter *filter, struct pv_figure *out, unsigned max)
{
    unsigned count = 0;

    for (unsigned type = 0; type < PV_IO_TYPES; type++) {
        struct pv_stats_type of;

        pv_stats_read(filter, type, &of);
        if (of.requests)
            figures_of(&of, pv_io_type_names[type], out, &count, max);
    }
    return count;
}

const struct pv_filter_class pv_stats_class = {
    .name = "stats",
    .order = PV_ANYWHERE,
    .size = sizeof(struct stats),
    .types = PV_ALL_TYPES,
    .open = stats_open,
    .request = stats_request,
    .completed = stats_completed,
    .figures = stats_figures,
};
