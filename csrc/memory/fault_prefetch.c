/* What was touched, and filling it ahead. See fault.h for the theory of operation. */
#include <string.h>

#include "fault_rooms.h"

/* Zeroes need none: pages that were fresh memory for one clone are so for the next. */
static int has_source(const struct pv_fault *server, const struct pv_vad *vad)
{
    return pv_vad_kind(vad) == PV_SOURCE_ZERO ||
           (pv_vad_source(vad) < PV_FAULT_SOURCES && server->sources[pv_vad_source(vad)]);
}

/* How many of pages[0..count) are consecutive, absent and one VAD's; they become one run. 0 when the first needs nothing. */
static uint64_t gather(struct pv_fault *server, const uint32_t *pages, uint64_t count, struct run *run)
{
    struct pv_translation base;
    uint64_t n = 1;

    if (pages[0] >= server->pages || !pv_fault_is_absent(server, pages[0]))
        return 0;
    pv_space_read_lock(server->config.space, server->prefetching);
    *run = (struct run){.page = pages[0], .reader = server->prefetching};
    if (pv_space_lookup(server->config.space, run->page << PV_PAGE_SHIFT, &base) && has_source(server, base.vad)) {
        uint64_t limit = pv_fault_locate(server, &base, run) ? 0 : pv_fault_pages_left(run);

        while (n < count && pages[n] == pages[0] + n && pages[n] < server->pages && n < limit &&
               pv_fault_continues(server, &base, pages[n], (int64_t)n))
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
        if (!n || !pv_fault_find_range(server, -1, run.page << PV_PAGE_SHIFT, &range))
            continue;
        pv_fault_clip(&run, &range);
        if (pv_fault_fill(server, &range, &run, PREFETCHED, &filled))
            break;
        total += filled;
    }
    pv_fault_count(&server->prefetch_count, total);
    pthread_mutex_unlock(&server->prefetch_lock);
    return total;
}

uint64_t pv_fault_recorded(struct pv_fault *server, uint32_t *pages, uint64_t room)
{
    uint64_t recorded = atomic_load_explicit(&server->recorded, memory_order_acquire);

    memcpy(pages, server->record, (recorded < room ? recorded : room) * sizeof *pages);
    return recorded;
}
