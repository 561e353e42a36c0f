/* See fault.h for the theory of operation. */
#include "fault.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "../common/cleanup.h"

#define MESSAGES 16 /* read at once: what several vCPUs and back ends may have asked meanwhile */

enum page_state { ABSENT, PRESENT, REMOVED, PREFETCHED };

/* A mapping of RAM; free while `length` is 0. */
struct range {
    int uffd;
    uint64_t start, length, offset;
};

struct pv_fault {
    struct pv_fault_config config;
    uint64_t pages;
    struct pv_source *sources[PV_FAULT_SOURCES];
    struct range ranges[PV_FAULT_RANGES]; /* under `table`; a back end that maps RAM anew removes and adds */
    int uffds[PV_FAULT_UFFDS];            /* under `table`; only ever added, so whoever knows one may go on using it */
    int uffd_count, own_uffd;
    pthread_mutex_t table; /* held for a look or a change, never across a system call that may wait */
    int wake; /* eventfd: stop, or a new range */
    _Atomic(int) stopping;
    _Atomic(uint32_t) around; /* fault-around window in pages */
    _Atomic(uint8_t) *state; /* [pages] */
    uint32_t *record;
    _Atomic(uint64_t) recorded;
    struct pv_reader *serving, *prefetching;
    pthread_mutex_t prefetch_lock;
    char reason[256];
    _Atomic(uint64_t) faults, pages_copied, pages_zeroed, already_there, removed_pages, prefetch_count, prefetch_hits;
    _Atomic(uint64_t) latency[PV_FAULT_BUCKETS];
};

/* A run of pages of RAM that one ioctl can fill. */
struct run {
    uint64_t page, count;
    struct pv_source *source; /* NULL: zeroes */
    uint64_t offset;          /* of its first page in the source */
    uint32_t number;          /* of the source */
};

static int fail(int *err, int code)
{
    *err = code;
    return -1;
}

static __attribute__((format(printf, 2, 3))) int give_up(struct pv_fault *server, const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    vsnprintf(server->reason, sizeof server->reason, format, arguments);
    va_end(arguments);
    return -1;
}

static void count(_Atomic(uint64_t) *counter, uint64_t n)
{
    atomic_fetch_add_explicit(counter, n, memory_order_relaxed);
}

static uint64_t now_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* ---- making and taking apart ----------------------------------------------------------------------------------------- */

static int allocate(struct pv_fault *server)
{
    server->state = calloc(server->pages, 1);
    server->record = calloc(server->config.record_pages ? server->config.record_pages : 1, sizeof *server->record);
    return server->state && server->record ? 0 : -1;
}

static int knows_uffd(const struct pv_fault *server, int uffd)
{
    for (int i = 0; i < server->uffd_count; i++)
        if (server->uffds[i] == uffd)
            return 1;
    return 0;
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
    if (server->own_uffd >= 0 && !knows_uffd(server, server->own_uffd))
        close(server->own_uffd);
    for (int i = 0; i < PV_FAULT_SOURCES; i++)
        pv_source_close(server->sources[i]);
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
        return give_up(server, "source %u: %s", source, why);
    return 0;
}

/* Under `table`. */
static int insert_range(struct pv_fault *server, struct range range, int *err)
{
    int known = knows_uffd(server, range.uffd);

    if (!known && server->uffd_count == PV_FAULT_UFFDS)
        return fail(err, ENOSPC);
    for (int i = 0; i < PV_FAULT_RANGES; i++) {
        if (server->ranges[i].length)
            continue;
        server->ranges[i] = range;
        if (!known)
            server->uffds[server->uffd_count++] = range.uffd;
        return 0;
    }
    return fail(err, ENOSPC);
}

int pv_fault_add_range(struct pv_fault *server, int uffd, uint64_t start, uint64_t length, uint64_t offset, int *err)
{
    int result;

    if ((start | length | offset) % PV_PAGE_SIZE || !length || length > server->config.ram_bytes ||
        offset > server->config.ram_bytes - length || start > UINT64_MAX - length)
        return fail(err, EINVAL);
    pthread_mutex_lock(&server->table);
    result = insert_range(server, (struct range){uffd, start, length, offset}, err);
    pthread_mutex_unlock(&server->table);
    if (!result)
        eventfd_write(server->wake, 1);
    return result;
}

int pv_fault_open_own(struct pv_fault *server, int device, int *err)
{
    cleanup_fd int uffd = device >= 0 ? ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK)
                                      : (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_MISSING_SHMEM};

    if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api))
        return fail(err, errno);
    server->own_uffd = steal_fd(&uffd);
    return 0;
}

int pv_fault_register_own(struct pv_fault *server, void *start, uint64_t length, uint64_t offset, int *err)
{
    struct uffdio_register registration = {
        .range = {(uintptr_t)start, length},
        .mode = UFFDIO_REGISTER_MODE_MISSING,
    };

    if (server->own_uffd < 0)
        return fail(err, ENXIO);
    /* The range first: a touch between the two would find a registration that nobody serves. */
    if (pv_fault_add_range(server, server->own_uffd, (uintptr_t)start, length, offset, err))
        return -1;
    if (ioctl(server->own_uffd, UFFDIO_REGISTER, &registration)) {
        *err = errno;
        pv_fault_forget_own(server, start);
        return -1;
    }
    return 0;
}

void pv_fault_forget_own(struct pv_fault *server, const void *start)
{
    pthread_mutex_lock(&server->table);
    for (int i = 0; i < PV_FAULT_RANGES; i++)
        if (server->ranges[i].uffd == server->own_uffd && server->ranges[i].start == (uintptr_t)start)
            server->ranges[i].length = 0;
    pthread_mutex_unlock(&server->table);
}

int pv_fault_map_hook(void *server, int mapped, void *start, uint64_t length, uint64_t offset)
{
    int err = 0;

    if (mapped)
        return pv_fault_register_own(server, start, length, offset, &err) ? err : 0;
    pv_fault_forget_own(server, start);
    return 0;
}

/* The range of `uffd` that holds `address`; 0 when there is none. With uffd -1: the first range that holds RAM offset `address`. */
static int find_range(struct pv_fault *server, int uffd, uint64_t address, struct range *out)
{
    int found = 0;

    pthread_mutex_lock(&server->table);
    for (int i = 0; i < PV_FAULT_RANGES && !found; i++) {
        const struct range *range = &server->ranges[i];
        uint64_t base = uffd < 0 ? range->offset : range->start;

        found = range->length && (uffd < 0 || range->uffd == uffd) && address >= base && address - base < range->length;
        if (found)
            *out = *range;
    }
    pthread_mutex_unlock(&server->table);
    return found;
}

/* ---- filling pages --------------------------------------------------------------------------------------------------- */

/* Where the data of `translation` lies, into `run`. 0, or -1 with a reason. */
static int locate(struct pv_fault *server, const struct pv_translation *translation, struct run *run)
{
    const struct pv_vad *vad = translation->vad;
    uint32_t number = pv_vad_source(vad);

    if (pv_vad_kind(vad) == PV_SOURCE_ZERO)
        return 0;
    if (number >= PV_FAULT_SOURCES || !server->sources[number])
        return give_up(server, "source %u of kind %u is not open", number, pv_vad_kind(vad));
    run->source = server->sources[number];
    run->number = number;
    run->offset = pv_vad_offset(vad) + ((uint64_t)translation->page << PV_PAGE_SHIFT);
    return 0;
}

/* Pages of its source that lie behind the run's first one, itself counted. */
static uint64_t pages_left(const struct run *run)
{
    uint64_t bytes = run->source ? pv_source_bytes(run->source) : 0;

    return !run->source ? UINT64_MAX : run->offset < bytes ? (bytes - run->offset) >> PV_PAGE_SHIFT : 0;
}

static int is_absent(struct pv_fault *server, uint64_t page)
{
    return atomic_load_explicit(&server->state[page], memory_order_relaxed) == ABSENT;
}

/* Is `page`, `distance` pages from the translated one, the same VAD's page at the same distance, and absent? Then one copy
 * can cover both. */
static int continues(struct pv_fault *server, const struct pv_translation *base, uint64_t page, int64_t distance)
{
    struct pv_translation other;

    return is_absent(server, page) && pv_space_lookup(server->config.space, page << PV_PAGE_SHIFT, &other) &&
           other.vad == base->vad && (int64_t)other.page - (int64_t)base->page == distance;
}

/* Widens a run of one page to its window, as far as neighbours continue it. */
static void widen(struct pv_fault *server, const struct pv_translation *base, struct run *run)
{
    uint64_t window = atomic_load_explicit(&server->around, memory_order_relaxed), page = run->page;
    uint64_t low = page & ~(window - 1), high = low + window;
    uint64_t first = page, last = page;
    uint64_t limit = pages_left(run);

    if (high > server->pages)
        high = server->pages;
    while (first > low && continues(server, base, first - 1, (int64_t)(first - 1) - (int64_t)page))
        first--;
    while (last + 1 < high && last + 1 - page < limit &&
           continues(server, base, last + 1, (int64_t)(last + 1 - page)))
        last++;
    run->offset -= run->source ? (page - first) << PV_PAGE_SHIFT : 0;
    run->page = first;
    run->count = last - first + 1;
}

/* The run to fill for a touch of `page`: 0, or -1 with a reason. */
static int plan_run(struct pv_fault *server, struct pv_reader *reader, uint64_t page, int around, struct run *run)
{
    struct pv_translation translation;
    int result = 0;

    *run = (struct run){.page = page, .count = 1};
    if (atomic_load_explicit(&server->state[page], memory_order_relaxed) == REMOVED)
        return 0;
    pv_space_read_lock(server->config.space, reader);
    if (!pv_space_lookup(server->config.space, page << PV_PAGE_SHIFT, &translation))
        result = give_up(server, "nothing is mapped at guest address 0x%llx", (unsigned long long)page << PV_PAGE_SHIFT);
    else
        result = locate(server, &translation, run);
    if (!result && around && is_absent(server, page))
        widen(server, &translation, run);
    pv_space_read_unlock(reader);
    return result;
}

/* One ioctl. Bytes filled, 0 when the first page is there already, or -errno. */
static int64_t fill_some(int uffd, uint64_t address, uint64_t length, const char *data)
{
    if (data) {
        struct uffdio_copy copy = {.dst = address, .src = (uintptr_t)data, .len = length};

        if (!ioctl(uffd, UFFDIO_COPY, &copy))
            return (int64_t)length;
        if (copy.copy > 0)
            return copy.copy;
    } else {
        struct uffdio_zeropage zero = {.range = {address, length}};

        if (!ioctl(uffd, UFFDIO_ZEROPAGE, &zero))
            return (int64_t)length;
        if (zero.zeropage > 0)
            return zero.zeropage;
    }
    return errno == EEXIST ? 0 : -errno;
}

static void note_filled(struct pv_fault *server, const struct run *run, uint64_t from, uint64_t pages, uint8_t state)
{
    for (uint64_t i = 0; i < pages; i++)
        atomic_store_explicit(&server->state[run->page + from + i], state, memory_order_relaxed);
    count(run->source ? &server->pages_copied : &server->pages_zeroed, pages);
}

/* Fills the run's pages from `done` on with one ioctl. As fill_some, or INT64_MIN with the source's reason in `why`. */
static int64_t fill_piece(const struct range *range, const struct run *run, uint64_t done, char *why)
{
    uint64_t address = range->start + ((run->page + done) << PV_PAGE_SHIFT) - range->offset;
    uint64_t length = (run->count - done) << PV_PAGE_SHIFT;
    struct pv_piece piece;
    int64_t bytes;

    if (!run->source)
        return fill_some(range->uffd, address, length, NULL);
    if (pv_source_get(run->source, run->offset + (done << PV_PAGE_SHIFT), length, &piece, why))
        return INT64_MIN;
    bytes = fill_some(range->uffd, address, piece.bytes, piece.data);
    pv_source_put(run->source, &piece);
    return bytes;
}

/* Fills a run through `range`; pages that are there already are skipped, the others get `state`. 0 with *filled = pages that this
 * call filled, whose touchers the kernel has woken, or -1 with a reason. Stops early, with 0, when the mapping is changing (EAGAIN:
 * a REMOVE event waits to be read, perhaps by this very thread, and what it removes must not be filled with old data) or has gone. */
static int fill_run(struct pv_fault *server, const struct range *range, const struct run *run, uint8_t state,
                    uint64_t *filled)
{
    uint64_t done = 0;

    *filled = 0;
    while (done < run->count) {
        char why[PV_SOURCE_WHY];
        int64_t bytes = fill_piece(range, run, done, why);

        if (bytes == -EAGAIN || bytes == -ESRCH || bytes == -ENOENT)
            return 0;
        if (bytes < 0 && state == PREFETCHED)
            return -1; /* whoever touches the page will say why */
        if (bytes == INT64_MIN)
            return give_up(server, "source %u: %s", run->number, why);
        if (bytes < 0)
            return give_up(server, "filling guest page 0x%llx: %s", (unsigned long long)(run->page + done),
                           strerror((int)-bytes));
        if (bytes == 0) {
            atomic_store_explicit(&server->state[run->page + done], PRESENT, memory_order_relaxed);
            count(&server->already_there, 1);
            bytes = PV_PAGE_SIZE;
        } else {
            note_filled(server, run, done, (uint64_t)bytes >> PV_PAGE_SHIFT, state);
            *filled += (uint64_t)bytes >> PV_PAGE_SHIFT;
        }
        done += (uint64_t)bytes >> PV_PAGE_SHIFT;
    }
    return 0;
}

/* ---- serving --------------------------------------------------------------------------------------------------------- */

static void wake_range(const struct range *range, uint64_t address, uint64_t length)
{
    struct uffdio_range wake = {address, length};

    ioctl(range->uffd, UFFDIO_WAKE, &wake); /* fails only when the process has gone */
}

static void note_touch(struct pv_fault *server, uint64_t page, uint64_t started)
{
    uint64_t at = atomic_load_explicit(&server->recorded, memory_order_relaxed);
    uint64_t ns = now_ns() - started;
    int bucket = ns ? 64 - __builtin_clzll(ns) : 0;

    if (at < server->config.record_pages) {
        server->record[at] = (uint32_t)page;
        atomic_store_explicit(&server->recorded, at + 1, memory_order_release);
    }
    count(&server->faults, 1);
    count(&server->latency[bucket < PV_FAULT_BUCKETS ? bucket : PV_FAULT_BUCKETS - 1], 1);
}

/* A run never leaves the mapping that it is filled through. */
static void clip_run(struct run *run, const struct range *range)
{
    uint64_t first = range->offset >> PV_PAGE_SHIFT, end = first + (range->length >> PV_PAGE_SHIFT);

    if (run->page < first) {
        run->offset += run->source ? (first - run->page) << PV_PAGE_SHIFT : 0;
        run->count -= first - run->page;
        run->page = first;
    }
    if (run->page + run->count > end)
        run->count = end - run->page;
}

static int serve_touch(struct pv_fault *server, int uffd, uint64_t address)
{
    uint64_t started = now_ns(), page, filled;
    struct range range;
    struct run run;

    if (!find_range(server, uffd, address, &range))
        return 0; /* its mapping was forgotten meanwhile: unmapping wakes the toucher */
    address &= ~(uint64_t)(PV_PAGE_SIZE - 1);
    page = (address - range.start + range.offset) >> PV_PAGE_SHIFT;
    if (atomic_load_explicit(&server->state[page], memory_order_relaxed) == PREFETCHED)
        count(&server->prefetch_hits, 1);
    if (plan_run(server, server->serving, page, 1, &run))
        return -1;
    clip_run(&run, &range);
    if (fill_run(server, &range, &run, PRESENT, &filled))
        return -1;
    if (filled != run.count)
        wake_range(&range, address, PV_PAGE_SIZE); /* another's copy came first, or none could be made: it faults again */
    note_touch(server, page, started);
    return 0;
}

static void note_removed(struct pv_fault *server, int uffd, uint64_t start, uint64_t end)
{
    struct range range;

    if (!find_range(server, uffd, start, &range))
        return;
    if (end > range.start + range.length)
        end = range.start + range.length;
    for (uint64_t a = start; a < end; a += PV_PAGE_SIZE) {
        uint64_t page = (a - range.start + range.offset) >> PV_PAGE_SHIFT;

        if (atomic_exchange(&server->state[page], REMOVED) != REMOVED)
            count(&server->removed_pages, 1);
    }
}

static int serve_messages(struct pv_fault *server, int uffd)
{
    struct uffd_msg messages[MESSAGES];
    ssize_t bytes = read(uffd, messages, sizeof messages);

    if (bytes < 0)
        return errno == EAGAIN || errno == EINTR ? 0 : give_up(server, "reading faults: %s", strerror(errno));
    for (size_t i = 0; i < (size_t)bytes / sizeof messages[0]; i++) {
        const struct uffd_msg *m = &messages[i];

        if (m->event == UFFD_EVENT_PAGEFAULT) {
            if (serve_touch(server, uffd, m->arg.pagefault.address))
                return -1;
        } else if (m->event == UFFD_EVENT_REMOVE) {
            note_removed(server, uffd, m->arg.remove.start, m->arg.remove.end);
        }
    }
    return 0;
}

/* Fills `polled` with the userfaultfds of now; how many. */
static int uffds_to_poll(struct pv_fault *server, struct pollfd *polled)
{
    int uffds;

    pthread_mutex_lock(&server->table);
    uffds = server->uffd_count;
    for (int i = 0; i < uffds; i++)
        polled[i] = (struct pollfd){server->uffds[i], POLLIN, 0};
    pthread_mutex_unlock(&server->table);
    return uffds;
}

int pv_fault_run(struct pv_fault *server, int *err)
{
    while (!atomic_load(&server->stopping)) {
        struct pollfd polled[PV_FAULT_UFFDS + 1] = {{server->wake, POLLIN, 0}};
        int uffds = uffds_to_poll(server, polled + 1);
        eventfd_t ignored;

        if (poll(polled, (nfds_t)uffds + 1, -1) < 0) {
            if (errno == EINTR)
                continue;
            return fail(err, errno);
        }
        if (polled[0].revents)
            eventfd_read(server->wake, &ignored);
        for (int i = 1; i <= uffds; i++)
            if (polled[i].revents & POLLIN && serve_messages(server, polled[i].fd))
                return fail(err, EIO);
    }
    return 0;
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

void pv_fault_wake_all(struct pv_fault *server)
{
    for (int i = 0; i < PV_FAULT_RANGES; i++) {
        struct range range;

        pthread_mutex_lock(&server->table);
        range = server->ranges[i];
        pthread_mutex_unlock(&server->table);
        if (range.length)
            wake_range(&range, range.start, range.length);
    }
}

/* ---- prefetching ----------------------------------------------------------------------------------------------------- */

static int has_source(const struct pv_fault *server, const struct pv_vad *vad)
{
    return pv_vad_source(vad) < PV_FAULT_SOURCES && server->sources[pv_vad_source(vad)];
}

/* How many of pages[0..count) are consecutive, absent and one VAD's; they become one run. 0 when the first needs nothing. */
static uint64_t gather(struct pv_fault *server, const uint32_t *pages, uint64_t count, struct run *run)
{
    struct pv_translation base;
    uint64_t n = 1;

    if (pages[0] >= server->pages || !is_absent(server, pages[0]))
        return 0;
    pv_space_read_lock(server->config.space, server->prefetching);
    *run = (struct run){.page = pages[0]};
    if (pv_space_lookup(server->config.space, run->page << PV_PAGE_SHIFT, &base) &&
        pv_vad_kind(base.vad) != PV_SOURCE_ZERO && has_source(server, base.vad)) {
        uint64_t limit = locate(server, &base, run) ? 0 : pages_left(run);

        while (n < count && pages[n] == pages[0] + n && pages[n] < server->pages && n < limit &&
               continues(server, &base, pages[n], (int64_t)n))
            n++;
        run->count = limit ? n : 0;
    }
    pv_space_read_unlock(server->prefetching);
    return run->count;
}

uint64_t pv_fault_prefetch(struct pv_fault *server, const uint32_t *pages, uint64_t count_)
{
    uint64_t total = 0;

    pthread_mutex_lock(&server->prefetch_lock);
    for (uint64_t i = 0; i < count_ && !atomic_load(&server->stopping);) {
        uint64_t filled = 0, n;
        struct range range;
        struct run run;

        n = gather(server, pages + i, count_ - i, &run);
        i += n ? n : 1;
        if (!n || !find_range(server, -1, run.page << PV_PAGE_SHIFT, &range))
            continue;
        clip_run(&run, &range);
        if (fill_run(server, &range, &run, PREFETCHED, &filled))
            break;
        total += filled;
    }
    count(&server->prefetch_count, total);
    pthread_mutex_unlock(&server->prefetch_lock);
    return total;
}

uint64_t pv_fault_recorded(struct pv_fault *server, uint32_t *pages, uint64_t room)
{
    uint64_t recorded = atomic_load_explicit(&server->recorded, memory_order_acquire);

    memcpy(pages, server->record, (recorded < room ? recorded : room) * sizeof *pages);
    return recorded;
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
    };
    out->bytes = (out->pages_copied + out->pages_zeroed) * PV_PAGE_SIZE;
    for (int i = 0; i < PV_FAULT_SOURCES; i++) {
        uint64_t loaded = 0, found = 0;

        if (server->sources[i])
            pv_source_counts(server->sources[i], &loaded, &found);
        out->units_loaded += loaded;
        out->units_found += found;
    }
    for (int i = 0; i < PV_FAULT_BUCKETS; i++)
        out->latency[i] = COUNTER(latency[i]);
#undef COUNTER
}
