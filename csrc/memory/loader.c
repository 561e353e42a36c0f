/* See loader.h for the theory of operation. */
#include "loader.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "../common/cleanup.h"
#include "source_kinds.h"

#define EVENTS 32
#define MAX_FRAMES (UINT64_C(1) << 30) /* what an entry can number */
#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

struct pv_loader {
    struct pv_loader_config config;
    struct pv_source *source;
    char *store; /* writable; nobody else's mapping is */
    uint64_t bytes;
    int store_fd, epoll, wake;
    unsigned char *loaded; /* [units] */
    _Atomic(int) stopping;
    pthread_mutex_t table; /* of `clients`: -1 where there is none */
    int clients[PV_LOADER_CLIENTS];
    _Atomic(uint64_t) counts[6]; /* in the order of struct pv_loader_counts */
};

enum { UNITS, BYTES, ASKED, FOUND, FULL, FAILED };

static int fail(int *err, int code)
{
    *err = code;
    return -1;
}

static void count(struct pv_loader *loader, int what, uint64_t n)
{
    atomic_fetch_add_explicit(&loader->counts[what], n, memory_order_relaxed);
}

/* ---- loading --------------------------------------------------------------------------------------------------------- */

static uint64_t unit_end(const struct pv_loader *loader, uint64_t unit)
{
    uint64_t end = (unit + 1) * loader->source->unit_bytes;

    return end < loader->bytes ? end : loader->bytes;
}

/* The whole unit into the store. 0, or -1: the limit, or the source could not. */
static int load_unit(struct pv_loader *loader, uint64_t unit)
{
    uint64_t start = unit * loader->source->unit_bytes, length = unit_end(loader, unit) - start;
    char why[PV_SOURCE_WHY];
    struct pv_piece piece;

    if (atomic_load_explicit(&loader->counts[BYTES], memory_order_relaxed) + length > loader->config.max_bytes) {
        count(loader, FULL, 1);
        return -1;
    }
    if (pv_source_get(loader->source, start, length, &piece, why)) {
        count(loader, FAILED, 1);
        return -1;
    }
    memcpy(loader->store + start, piece.data, length);
    pv_source_put(loader->source, &piece);
    loader->loaded[unit] = 1;
    count(loader, UNITS, 1);
    count(loader, BYTES, length);
    return 0;
}

/* The VAD's entries whose pages lie in `unit` get `state`; the data is there before any says PRESENT. */
static void mark(struct pv_loader *loader, const struct pv_vad *vad, uint64_t unit, enum pv_pfe_state state)
{
    uint64_t first = pv_vad_offset(vad) >> PV_PAGE_SHIFT;
    uint64_t from = unit * loader->source->unit_bytes >> PV_PAGE_SHIFT, to = unit_end(loader, unit) >> PV_PAGE_SHIFT;
    uint64_t end = first + atomic_load_explicit(&vad->pages, memory_order_relaxed);
    uint32_t pfe = pv_pfdb_first_pfe(loader->config.db, vad);

    for (uint64_t page = from > first ? from : first; page < to && page < end; page++)
        atomic_store_explicit(&loader->config.db->slots[pfe + (page - first)],
                              pv_pfe_make(pfe - PV_VAD_SLOTS, state, state == PV_PFE_PRESENT ? (uint32_t)page : 0),
                              memory_order_release);
}

/* 0: the page is in the store and its entry says so. */
static int serve_page(struct pv_loader *loader, const struct pv_loader_ask *ask)
{
    const struct pv_vad *vad = pv_pfdb_vad(loader->config.db, ask->vad);
    uint64_t offset, unit;

    if (!vad || pv_vad_source(vad) != loader->config.source || pv_vad_kind(vad) != loader->config.kind ||
        ask->page >= atomic_load_explicit(&vad->pages, memory_order_relaxed))
        return -1;
    count(loader, ASKED, 1);
    offset = pv_vad_offset(vad) + ((uint64_t)ask->page << PV_PAGE_SHIFT);
    if (offset >= loader->bytes)
        return -1;
    unit = offset / loader->source->unit_bytes;
    if (loader->loaded[unit]) {
        count(loader, FOUND, 1);
    } else {
        mark(loader, vad, unit, PV_PFE_LOADING);
        if (load_unit(loader, unit)) {
            mark(loader, vad, unit, PV_PFE_ABSENT);
            return -1;
        }
    }
    mark(loader, vad, unit, PV_PFE_PRESENT);
    return 0;
}

/* ---- clients --------------------------------------------------------------------------------------------------------- */

static void drop_client(struct pv_loader *loader, int client)
{
    pthread_mutex_lock(&loader->table);
    for (int i = 0; i < PV_LOADER_CLIENTS; i++)
        if (loader->clients[i] == client)
            loader->clients[i] = -1;
    pthread_mutex_unlock(&loader->table);
    close(client); /* which takes it out of epoll */
}

/* One message at a time, so that nobody who asks much keeps others waiting longer than a load. */
static void serve_client(struct pv_loader *loader, int client)
{
    struct pv_loader_answer answer = {0};
    ssize_t n = recv(client, &answer.to, sizeof answer.to, MSG_DONTWAIT | MSG_TRUNC);

    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (n != sizeof answer.to) {
        drop_client(loader, client);
        return;
    }
    answer.no = serve_page(loader, &answer.to) != 0;
    if (send(client, &answer, sizeof answer, MSG_DONTWAIT | MSG_NOSIGNAL) != sizeof answer)
        drop_client(loader, client);
}

static int keep_client(struct pv_loader *loader, int client)
{
    int kept = -1;

    pthread_mutex_lock(&loader->table);
    for (int i = 0; i < PV_LOADER_CLIENTS && kept < 0; i++)
        if (loader->clients[i] < 0)
            loader->clients[kept = i] = client;
    pthread_mutex_unlock(&loader->table);
    return kept < 0 ? -1 : 0;
}

int pv_loader_add_client(struct pv_loader *loader, int *client, int *err)
{
    struct epoll_event event = {.events = EPOLLIN};
    int pair[2];

    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair))
        return fail(err, errno);
    event.data.fd = pair[0];
    if (keep_client(loader, pair[0])) {
        close(pair[0]);
        close(pair[1]);
        return fail(err, ENOSPC);
    }
    if (epoll_ctl(loader->epoll, EPOLL_CTL_ADD, pair[0], &event)) {
        *err = errno;
        drop_client(loader, pair[0]);
        close(pair[1]);
        return -1;
    }
    *client = pair[1];
    return 0;
}

int pv_loader_run(struct pv_loader *loader, int *err)
{
    struct epoll_event events[EVENTS];

    while (!atomic_load(&loader->stopping)) {
        int ready = epoll_wait(loader->epoll, events, EVENTS, -1);

        if (ready < 0 && errno != EINTR)
            return fail(err, errno);
        for (int i = 0; i < ready && !atomic_load(&loader->stopping); i++)
            if (events[i].data.fd != loader->wake)
                serve_client(loader, events[i].data.fd);
    }
    return 0;
}

void pv_loader_stop(struct pv_loader *loader)
{
    atomic_store(&loader->stopping, 1);
    eventfd_write(loader->wake, 1);
}

/* ---- making and ending ----------------------------------------------------------------------------------------------- */

static int make_store(struct pv_loader *loader)
{
    cleanup_fd int fd = memfd_create("podvisor-store", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    char path[32];
    void *map;

    if (fd < 0 || ftruncate(fd, (off_t)loader->bytes))
        return -1;
    map = mmap(NULL, loader->bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
    if (map == MAP_FAILED)
        return -1;
    loader->store = map;
    if (fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL))
        return -1;
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    loader->store_fd = open(path, O_RDONLY | O_CLOEXEC);
    return loader->store_fd < 0 ? -1 : 0;
}

static int make_queue(struct pv_loader *loader)
{
    struct epoll_event event = {.events = EPOLLIN};

    loader->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    loader->epoll = epoll_create1(EPOLL_CLOEXEC);
    event.data.fd = loader->wake;
    return loader->wake < 0 || loader->epoll < 0 || epoll_ctl(loader->epoll, EPOLL_CTL_ADD, loader->wake, &event) ? -1 : 0;
}

static int set_up(struct pv_loader *loader, int *err, char why[PV_SOURCE_WHY])
{
    const struct pv_loader_config *config = &loader->config;

    if (config->kind != PV_SOURCE_ZSTD && config->kind != PV_SOURCE_REMOTE) {
        *err = EINVAL;
        return pv_source_why(why, "kind %d is not dear: there is nothing to load", config->kind);
    }
    if (pv_source_open(config->kind, config->fd, config->bytes, &loader->source, err, why))
        return -1;
    loader->bytes = pv_source_bytes(loader->source);
    if (loader->bytes >> PV_PAGE_SHIFT > MAX_FRAMES) {
        *err = EFBIG;
        return pv_source_why(why, "%llu bytes are more pages than an entry can number", (unsigned long long)loader->bytes);
    }
    loader->loaded = calloc(loader->bytes / loader->source->unit_bytes + 1, 1);
    if (!loader->loaded || make_store(loader) || make_queue(loader)) {
        *err = loader->loaded ? errno : ENOMEM;
        return pv_source_why(why, "%s", strerror(*err));
    }
    return 0;
}

int pv_loader_create(const struct pv_loader_config *config, struct pv_loader **out, int *err, char why[PV_SOURCE_WHY])
{
    struct pv_loader *loader = calloc(1, sizeof *loader);

    if (!loader) {
        *err = ENOMEM;
        return pv_source_why(why, "no memory");
    }
    loader->config = *config;
    loader->store_fd = loader->epoll = loader->wake = -1;
    pthread_mutex_init(&loader->table, NULL);
    for (int i = 0; i < PV_LOADER_CLIENTS; i++)
        loader->clients[i] = -1;
    if (set_up(loader, err, why)) {
        pv_loader_destroy(loader);
        return -1;
    }
    *out = loader;
    return 0;
}

void pv_loader_destroy(struct pv_loader *loader)
{
    if (!loader)
        return;
    for (int i = 0; i < PV_LOADER_CLIENTS; i++)
        pv_cleanup_fd(&loader->clients[i]);
    pv_cleanup_fd(&loader->store_fd);
    pv_cleanup_fd(&loader->epoll);
    pv_cleanup_fd(&loader->wake);
    if (loader->store)
        munmap(loader->store, loader->bytes);
    pv_source_close(loader->source);
    pthread_mutex_destroy(&loader->table);
    free(loader->loaded);
    free(loader);
}

int pv_loader_store(const struct pv_loader *loader)
{
    return loader->store_fd;
}

void pv_loader_count(const struct pv_loader *loader, struct pv_loader_counts *out)
{
#define COUNTER(what) atomic_load_explicit(&loader->counts[what], memory_order_relaxed)
    *out = (struct pv_loader_counts){COUNTER(UNITS), COUNTER(BYTES), COUNTER(ASKED),
                                     COUNTER(FOUND), COUNTER(FULL),  COUNTER(FAILED)};
#undef COUNTER
}
