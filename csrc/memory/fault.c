/* The server as a whole: made, ended, counted. See fault.h for the theory of operation. */
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "fault_rooms.h"

__attribute__((format(printf, 2, 3))) int pv_fault_give_up(struct pv_fault *server, const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    vsnprintf(server->reason, sizeof server->reason, format, arguments);
    va_end(arguments);
    return -1;
}

void pv_fault_count(_Atomic(uint64_t) *counter, uint64_t n)
{
    atomic_fetch_add_explicit(counter, n, memory_order_relaxed);
}

static int allocate(struct pv_fault *server)
{
    server->state = calloc(server->pages, 1);
    server->record = calloc(server->config.record_pages ? server->config.record_pages : 1, sizeof *server->record);
    return server->state && server->record ? 0 : -1;
}

static int is_window(uint32_t pages)
{
    return pages && !(pages & (pages - 1)) && pages <= 512;
}

int pv_fault_set_around(struct pv_fault *server, uint32_t around_pages, int *err)
{
    if (!is_window(around_pages))
        return fail(err, EINVAL);
    atomic_store_explicit(&server->around, around_pages, memory_order_relaxed);
    return 0;
}

int pv_fault_create(const struct pv_fault_config *config, struct pv_fault **out, int *err)
{
    struct pv_fault *server;

    if (!config->ram_bytes || config->ram_bytes % PV_PAGE_SIZE || !is_window(config->around_pages))
        return fail(err, EINVAL);
    server = calloc(1, sizeof *server);
    if (!server)
        return fail(err, ENOMEM);
    server->config = *config;
    atomic_init(&server->around, config->around_pages);
    server->pages = config->ram_bytes >> PV_PAGE_SHIFT;
    server->wake = server->own_uffd = -1;
    pthread_mutex_init(&server->table, NULL);
    pthread_mutex_init(&server->prefetch_lock, NULL);
    *err = ENOMEM;
    if (allocate(server) || pv_space_add_reader(config->space, &server->serving, err) ||
        pv_space_add_reader(config->space, &server->prefetching, err)) {
        pv_fault_destroy(server);
        return -1;
    }
    server->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (server->wake < 0) {
        *err = errno;
        pv_fault_destroy(server);
        return -1;
    }
    *out = server;
    return 0;
}

void pv_fault_destroy(struct pv_fault *server)
{
    if (!server)
        return;
    for (int i = 0; i < server->uffd_count; i++)
        close(server->uffds[i]);
    if (server->own_uffd >= 0 && !pv_fault_knows_uffd(server, server->own_uffd))
        close(server->own_uffd);
    for (int i = 0; i < PV_FAULT_SOURCES; i++) {
        pv_frames_close(server->frames[i]);
        pv_source_close(server->sources[i]);
    }
    if (server->serving)
        pv_space_remove_reader(server->config.space, server->serving);
    if (server->prefetching)
        pv_space_remove_reader(server->config.space, server->prefetching);
    if (server->wake >= 0)
        close(server->wake);
    pthread_mutex_destroy(&server->table);
    pthread_mutex_destroy(&server->prefetch_lock);
    free(server->state);
    free(server->record);
    free(server);
}

int pv_fault_add_source(struct pv_fault *server, uint32_t source, enum pv_source_kind kind, int fd, uint64_t bytes,
                        int *err)
{
    char why[PV_SOURCE_WHY];

    if (source >= PV_FAULT_SOURCES)
        return fail(err, EINVAL);
    if (server->sources[source])
        return fail(err, EEXIST);
    if (pv_source_open(kind, fd, bytes, &server->sources[source], err, why))
        return pv_fault_give_up(server, "source %u: %s", source, why);
    return 0;
}

int pv_fault_share_source(struct pv_fault *server, uint32_t source, int store, int loader, int *err)
{
    if (source >= PV_FAULT_SOURCES || !server->sources[source] || !pv_source_is_dear(server->sources[source]))
        return fail(err, EINVAL);
    if (server->frames[source])
        return fail(err, EEXIST);
    return pv_frames_open(store, loader, &server->frames[source], err);
}

void pv_fault_stop(struct pv_fault *server)
{
    atomic_store(&server->stopping, 1);
    eventfd_write(server->wake, 1);
}

const char *pv_fault_reason(const struct pv_fault *server)
{
    return server->reason;
}

void pv_fault_stats(struct pv_fault *server, struct pv_fault_stats *out)
{
#define COUNTER(name) atomic_load_explicit(&server->name, memory_order_relaxed)
    *out = (struct pv_fault_stats){
        .faults = COUNTER(faults),
        .pages_copied = COUNTER(pages_copied),
        .pages_zeroed = COUNTER(pages_zeroed),
        .already_there = COUNTER(already_there),
        .removed_pages = COUNTER(removed_pages),
        .prefetched = COUNTER(prefetch_count),
        .prefetch_hits = COUNTER(prefetch_hits),
        .latency_ns = COUNTER(latency_ns),
    };
    out->bytes = (out->pages_copied + out->pages_zeroed) * PV_PAGE_SIZE;
    for (int i = 0; i < PV_FAULT_SOURCES; i++) {
        uint64_t loaded = 0, found = 0, shared = 0, asked = 0;

        if (server->sources[i])
            pv_source_counts(server->sources[i], &loaded, &found);
        if (server->frames[i])
            pv_frames_counts(server->frames[i], &shared, &asked);
        out->units_loaded += loaded;
        out->units_found += found;
        out->frames_found += shared;
        out->frames_asked += asked;
    }
    for (int i = 0; i < PV_FAULT_BUCKETS; i++)
        out->latency[i] = COUNTER(latency[i]);
#undef COUNTER
}
