/* From a page to the run that one copy fills, and the copy. See fault.h for the theory of operation. */
#include <errno.h>
#include <linux/userfaultfd.h>
#include <string.h>
#include <sys/ioctl.h>

#include "fault_rooms.h"
#include "loader.h"

/* Where the data of `translation` lies, into `run`. 0, or -1 with a reason. */
int pv_fault_locate(struct pv_fault *server, const struct pv_translation *translation, struct run *run)
{
    const struct pv_vad *vad = translation->vad;
    uint32_t number = pv_vad_source(vad);

    if (pv_vad_kind(vad) == PV_SOURCE_ZERO)
        return 0;
    if (number >= PV_FAULT_SOURCES || !server->sources[number])
        return pv_fault_give_up(server, "source %u of kind %u is not open", number, pv_vad_kind(vad));
    run->source = server->sources[number];
    run->number = number;
    run->offset = pv_vad_offset(vad) + ((uint64_t)translation->page << PV_PAGE_SHIFT);
    return 0;
}

/* Pages of its source that lie behind the run's first one, itself counted. */
uint64_t pv_fault_pages_left(const struct run *run)
{
    uint64_t bytes = run->source ? pv_source_bytes(run->source) : 0;

    return !run->source ? UINT64_MAX : run->offset < bytes ? (bytes - run->offset) >> PV_PAGE_SHIFT : 0;
}

int pv_fault_is_absent(struct pv_fault *server, uint64_t page)
{
    return atomic_load_explicit(&server->state[page], memory_order_relaxed) == ABSENT;
}

/* Is `page`, `distance` pages from the translated one, the same VAD's page at the same distance, and absent? Then one copy
 * can cover both. */
int pv_fault_continues(struct pv_fault *server, const struct pv_translation *base, uint64_t page, int64_t distance)
{
    struct pv_translation other;

    return pv_fault_is_absent(server, page) && pv_space_lookup(server->config.space, page << PV_PAGE_SHIFT, &other) &&
           other.vad == base->vad && (int64_t)other.page - (int64_t)base->page == distance;
}

/* Widens a run of one page to its window, as far as neighbours continue it. */
static void widen(struct pv_fault *server, const struct pv_translation *base, struct run *run)
{
    uint64_t window = atomic_load_explicit(&server->around, memory_order_relaxed), page = run->page;
    uint64_t low = page & ~(window - 1), high = low + window;
    uint64_t first = page, last = page;
    uint64_t limit = pv_fault_pages_left(run);

    if (high > server->pages)
        high = server->pages;
    while (first > low && pv_fault_continues(server, base, first - 1, (int64_t)(first - 1) - (int64_t)page))
        first--;
    while (last + 1 < high && last + 1 - page < limit &&
           pv_fault_continues(server, base, last + 1, (int64_t)(last + 1 - page)))
        last++;
    run->offset -= run->source ? (page - first) << PV_PAGE_SHIFT : 0;
    run->page = first;
    run->count = last - first + 1;
}

/* The run to fill for a touch of `page`: 0, or -1 with a reason. */
int pv_fault_plan(struct pv_fault *server, struct pv_reader *reader, uint64_t page, int around, struct run *run)
{
    struct pv_translation translation;
    int result = 0;

    *run = (struct run){.page = page, .count = 1, .reader = reader};
    if (atomic_load_explicit(&server->state[page], memory_order_relaxed) == REMOVED)
        return 0;
    pv_space_read_lock(server->config.space, reader);
    if (!pv_space_lookup(server->config.space, page << PV_PAGE_SHIFT, &translation))
        result = pv_fault_give_up(server, "nothing is mapped at guest address 0x%llx", (unsigned long long)page << PV_PAGE_SHIFT);
    else
        result = pv_fault_locate(server, &translation, run);
    if (!result && around && pv_fault_is_absent(server, page))
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

/* A removed page stays one, whatever is filled in: the hole may be punched after the filling (its event is read before), and then
 * the page is zeroes again, never the source's data. */
static void set_state(struct pv_fault *server, uint64_t page, uint8_t state)
{
    uint8_t now = atomic_load_explicit(&server->state[page], memory_order_relaxed);

    while (now != REMOVED && !atomic_compare_exchange_weak(&server->state[page], &now, state))
        ;
}

static void note_filled(struct pv_fault *server, const struct run *run, uint64_t from, uint64_t pages, uint8_t state)
{
    for (uint64_t i = 0; i < pages; i++)
        set_state(server, run->page + from + i, state);
    pv_fault_count(run->source ? &server->pages_copied : &server->pages_zeroed, pages);
}

/* The frame of the run's page `done`, and of those behind it that are there too. 1 with *out, 0 when it is not there, then with what to
 * ask for in *ask, or -1 when it need not be asked for: the mapping has changed since the run was planned. */
static int find_frames(struct pv_fault *server, const struct run *run, uint64_t done, struct pv_piece *out,
                       struct pv_loader_ask *ask)
{
    uint64_t address = (run->page + done) << PV_PAGE_SHIFT, offset = run->offset + (done << PV_PAGE_SHIFT);
    struct pv_translation t;
    int result = -1;

    pv_space_read_lock(server->config.space, run->reader);
    if (pv_space_lookup(server->config.space, address, &t) && pv_vad_source(t.vad) == run->number &&
        pv_vad_offset(t.vad) + ((uint64_t)t.page << PV_PAGE_SHIFT) == offset) {
        *ask = (struct pv_loader_ask){t.vad->number, t.page};
        result = pv_frames_find(server->frames[run->number], server->config.db, &t, run->count - done, out);
    }
    pv_space_read_unlock(run->reader);
    return result;
}

/* The run's data from page `done` on: a frame that the host has loaded, or the source itself. 0, or -1 with a reason. */
static int get_piece(struct pv_fault *server, const struct run *run, uint64_t done, struct pv_piece *out, char *why)
{
    struct pv_frames *frames = server->frames[run->number];
    struct pv_loader_ask ask;
    int found;

    if (frames) {
        found = find_frames(server, run, done, out, &ask);
        if (!found && !pv_frames_ask(frames, ask.vad, ask.page))
            found = find_frames(server, run, done, out, &ask);
        if (found > 0)
            return 0;
    }
    return pv_source_get(run->source, run->offset + (done << PV_PAGE_SHIFT), (run->count - done) << PV_PAGE_SHIFT, out, why);
}

/* Fills the run's pages from `done` on with one ioctl. As fill_some, or INT64_MIN with the source's reason in `why`. */
static int64_t fill_piece(struct pv_fault *server, const struct range *range, const struct run *run, uint64_t done, char *why)
{
    uint64_t address = range->start + ((run->page + done) << PV_PAGE_SHIFT) - range->offset;
    uint64_t length = (run->count - done) << PV_PAGE_SHIFT;
    struct pv_piece piece;
    int64_t bytes;

    if (!run->source)
        return fill_some(range->uffd, address, length, NULL);
    if (get_piece(server, run, done, &piece, why))
        return INT64_MIN;
    bytes = fill_some(range->uffd, address, piece.bytes, piece.data);
    pv_source_put(run->source, &piece);
    return bytes;
}

/* Fills a run through `range`; pages that are there already are skipped, the others get `state`. 0 with *filled = pages that this
 * call filled, whose touchers the kernel has woken, or -1 with a reason. Stops early, with 0, when the mapping is changing (EAGAIN:
 * a REMOVE event waits to be read, perhaps by this very thread, and what it removes must not be filled with old data) or has gone. */
int pv_fault_fill(struct pv_fault *server, const struct range *range, const struct run *run, uint8_t state,
                    uint64_t *filled)
{
    uint64_t done = 0;

    *filled = 0;
    while (done < run->count) {
        char why[PV_SOURCE_WHY];
        int64_t bytes = fill_piece(server, range, run, done, why);

        if (bytes == -EAGAIN || bytes == -ESRCH || bytes == -ENOENT)
            return 0;
        if (bytes < 0 && state == PREFETCHED)
            return -1; /* whoever touches the page will say why */
        if (bytes == INT64_MIN)
            return pv_fault_give_up(server, "source %u: %s", run->number, why);
        if (bytes < 0)
            return pv_fault_give_up(server, "filling guest page 0x%llx: %s", (unsigned long long)(run->page + done),
                           strerror((int)-bytes));
        if (bytes == 0) {
            set_state(server, run->page + done, PRESENT);
            pv_fault_count(&server->already_there, 1);
            bytes = PV_PAGE_SIZE;
        } else {
            note_filled(server, run, done, (uint64_t)bytes >> PV_PAGE_SHIFT, state);
            *filled += (uint64_t)bytes >> PV_PAGE_SHIFT;
        }
        done += (uint64_t)bytes >> PV_PAGE_SHIFT;
    }
    return 0;
}

/* A run never leaves the mapping that it is filled through. */
void pv_fault_clip(struct run *run, const struct range *range)
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
