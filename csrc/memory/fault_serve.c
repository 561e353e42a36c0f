/* The loop: touches and removals as they come. See fault.h for the theory of operation. */
#include <errno.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "fault_place.h"
#include "fault_rooms.h"
#include "../percpu/trace_point.h"

#define MESSAGES 16 /* read at once: what several vCPUs and back ends may have asked meanwhile */

static uint64_t now_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
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
    pv_fault_count(&server->faults, 1);
    pv_fault_count(&server->latency_ns, ns);
    pv_fault_count(&server->latency[bucket < PV_FAULT_BUCKETS ? bucket : PV_FAULT_BUCKETS - 1], 1);
}

static int serve_touch(struct pv_fault *server, int uffd, uint64_t address)
{
    uint64_t started = now_ns(), ticks = PV_TRACE_NOW(), page, filled;
    struct range range;
    struct run run;

    if (!pv_fault_find_range(server, uffd, address, &range))
        return 0; /* its mapping was forgotten meanwhile: unmapping wakes the toucher */
    address &= ~(uint64_t)(PV_PAGE_SIZE - 1);
    page = (address - range.start + range.offset) >> PV_PAGE_SHIFT;
    if (atomic_load_explicit(&server->state[page], memory_order_relaxed) == PREFETCHED)
        pv_fault_count(&server->prefetch_hits, 1);
    if (pv_fault_plan(server, server->serving, page, 1, &run))
        return -1;
    pv_fault_clip(&run, &range);
    if (pv_fault_fill(server, &range, &run, PRESENT, &filled))
        return -1;
    if (filled != run.count)
        pv_fault_wake_range(&range, address, PV_PAGE_SIZE); /* another's copy came first, or none could be made: it faults again */
    note_touch(server, page, started);
    PV_TRACE_SPAN(PV_TRACE_FAULT, ticks, page << PV_PAGE_SHIFT);
    return 0;
}

static void note_removed(struct pv_fault *server, int uffd, uint64_t start, uint64_t end)
{
    struct range range;

    if (!pv_fault_find_range(server, uffd, start, &range))
        return;
    if (end > range.start + range.length)
        end = range.start + range.length;
    for (uint64_t a = start; a < end; a += PV_PAGE_SIZE) {
        uint64_t page = (a - range.start + range.offset) >> PV_PAGE_SHIFT;

        if (atomic_exchange(&server->state[page], REMOVED) != REMOVED)
            pv_fault_count(&server->removed_pages, 1);
    }
}

static int serve_messages(struct pv_fault *server, struct place *place, int uffd)
{
    struct uffd_msg messages[MESSAGES];
    ssize_t bytes = read(uffd, messages, sizeof messages);
    size_t count;

    if (bytes < 0)
        return errno == EAGAIN || errno == EINTR ? 0 : pv_fault_give_up(server, "reading faults: %s", strerror(errno));
    count = (size_t)bytes / sizeof messages[0];
    /* Removals first: whoever removes goes on now that this is read, and a fault that came before must not be filled with the old
     * data after the removal. */
    for (size_t i = 0; i < count; i++)
        if (messages[i].event == UFFD_EVENT_REMOVE)
            note_removed(server, uffd, messages[i].arg.remove.start, messages[i].arg.remove.end);
    if (count)
        pv_place_fault(place, now_ns());
    for (size_t i = 0; i < count; i++)
        if (messages[i].event == UFFD_EVENT_PAGEFAULT && serve_touch(server, uffd, messages[i].arg.pagefault.address))
            return -1;
    pv_place_answered(place, now_ns());
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

void pv_fault_trace(const void *hook)
{
    pv_trace_use(hook);
}

int pv_fault_run(struct pv_fault *server, int *err)
{
    struct place place;

    pv_place_begin(&place);
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
            if (polled[i].revents & POLLIN && serve_messages(server, &place, polled[i].fd))
                return fail(err, EIO);
    }
    return 0;
}
