/* See pfdb.h for the theory of operation. */
#include "pfdb.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../common/cleanup.h"

#define MAGIC 0x3342444650565650u /* "PVVPFDB3" */
#define MAX_ENTRIES (1u << 30)
#define HUGE_PAGE ((size_t)2 << 20)
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

/* The file: this header in a page of its own, the directory, then the slots from a huge page's boundary on. */
struct header {
    uint64_t magic;
    uint32_t max_vads;
    uint32_t max_pfes;
};

/* A run of slots that no VAD uses. Kept sorted by `first` and coalesced. */
struct run {
    uint32_t first, count;
};

struct pv_pfdb_writer {
    struct run *runs;
    size_t count, capacity;
    uint32_t next_vad; /* where the search for a free VAD begins */
    uint32_t pages;    /* of all VADs */
    size_t huge;       /* bytes of the file up to which the slots have been collapsed into huge pages */
};

static int fail(int *err, int code)
{
    *err = code;
    return -1;
}

static size_t round_page(size_t bytes)
{
    return (bytes + PV_PAGE_SIZE - 1) & ~(size_t)(PV_PAGE_SIZE - 1);
}

static size_t slots_at(uint32_t max_vads)
{
    size_t bytes = PV_PAGE_SIZE + (size_t)max_vads * sizeof(uint32_t);

    return (bytes + HUGE_PAGE - 1) & ~(HUGE_PAGE - 1);
}

/* Slot 0 is not used, but max_pfes counts it as an entry. */
static uint64_t slots_for(uint32_t max_vads, uint32_t max_pfes)
{
    return max_pfes + (uint64_t)PV_VAD_SLOTS * max_vads;
}

static size_t file_size(uint32_t max_vads, uint32_t max_pfes)
{
    return slots_at(max_vads) + round_page(slots_for(max_vads, max_pfes) * sizeof(pv_pfe));
}

static int numbers_are_sane(uint32_t max_vads, uint32_t max_pfes)
{
    return max_vads && max_pfes && max_vads <= MAX_ENTRIES && max_pfes <= MAX_ENTRIES;
}

static int runs_insert(struct pv_pfdb_writer *writer, size_t at, struct run run, int *err)
{
    if (writer->count == writer->capacity) {
        size_t capacity = writer->capacity ? 2 * writer->capacity : 16;
        struct run *runs = reallocarray(writer->runs, capacity, sizeof *runs);

        if (!runs)
            return fail(err, ENOMEM);
        writer->runs = runs;
        writer->capacity = capacity;
    }
    memmove(&writer->runs[at + 1], &writer->runs[at], (writer->count - at) * sizeof run);
    writer->runs[at] = run;
    writer->count++;
    return 0;
}

static void runs_delete(struct pv_pfdb_writer *writer, size_t at)
{
    writer->count--;
    memmove(&writer->runs[at], &writer->runs[at + 1], (writer->count - at) * sizeof writer->runs[0]);
}

/* Index of the first run that begins after `first`. */
static size_t runs_after(const struct pv_pfdb_writer *writer, uint32_t first)
{
    size_t low = 0, high = writer->count;

    while (low < high) {
        size_t middle = low + (high - low) / 2;

        if (writer->runs[middle].first > first)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

/* Gives entries back, joined with their neighbours. Fails only for want of memory, before anything has changed. */
static int runs_give(struct pv_pfdb_writer *writer, struct run run, int *err)
{
    size_t at = runs_after(writer, run.first);
    int joins_left = at > 0 && writer->runs[at - 1].first + writer->runs[at - 1].count == run.first;
    int joins_right = at < writer->count && run.first + run.count == writer->runs[at].first;

    if (joins_left && joins_right) {
        writer->runs[at - 1].count += run.count + writer->runs[at].count;
        runs_delete(writer, at);
    } else if (joins_left) {
        writer->runs[at - 1].count += run.count;
    } else if (joins_right) {
        writer->runs[at].first = run.first;
        writer->runs[at].count += run.count;
    } else {
        return runs_insert(writer, at, run, err);
    }
    return 0;
}

/* First fit: runs are few (one a gap between VADs), and low entries stay dense, which keeps their pages few. */
static int runs_take(struct pv_pfdb_writer *writer, uint32_t count, uint32_t *first)
{
    for (size_t i = 0; i < writer->count; i++) {
        struct run *run = &writer->runs[i];

        if (run->count < count)
            continue;
        *first = run->first;
        run->first += count;
        run->count -= count;
        if (!run->count)
            runs_delete(writer, i);
        return 0;
    }
    return -1;
}

static int compare_runs(const void *a, const void *b)
{
    const struct run *x = a, *y = b;

    return (x->first > y->first) - (x->first < y->first);
}

/* The run of slots of the VAD of that number. 0 when there is none; a run of no slots when what is there makes no sense. */
static int run_of(const struct pv_pfdb *db, uint32_t number, struct run *out)
{
    uint32_t slot = atomic_load_explicit(&db->directory[number], memory_order_relaxed);
    const struct pv_vad *vad = pv_pfdb_vad_at(db, slot);
    uint32_t pages;

    if (!slot)
        return 0;
    *out = (struct run){slot, 0};
    if (slot > db->slot_count - PV_VAD_SLOTS)
        return 1;
    pages = atomic_load_explicit(&vad->pages, memory_order_relaxed);
    if (pages && vad->number == number && pages <= db->slot_count - PV_VAD_SLOTS - slot)
        out->count = pages + PV_VAD_SLOTS;
    return 1;
}

/* The runs in use, from the directory, sorted. *count of them; the caller frees. */
static struct run *used_runs(const struct pv_pfdb *db, size_t *count, int *err)
{
    struct run *used, run;

    *count = 0;
    for (uint32_t v = 1; v < db->max_vads; v++)
        *count += run_of(db, v, &run);
    used = calloc(*count ? *count : 1, sizeof *used);
    if (!used) {
        *err = ENOMEM;
        return NULL;
    }
    for (uint32_t v = 1, i = 0; v < db->max_vads; v++)
        if (run_of(db, v, &run))
            used[i++] = run;
    qsort(used, *count, sizeof *used, compare_runs);
    return used;
}

/* Free runs are the gaps between used ones. EBADMSG when VADs overlap or stick out: the file is not to be believed. */
static int derive_free_runs(struct pv_pfdb *db, int *err)
{
    size_t count;
    cleanup_free struct run *used = used_runs(db, &count, err);
    uint32_t next = 1;

    if (!used)
        return -1;
    for (size_t i = 0; i < count; i++) {
        if (used[i].first < next || !used[i].count)
            return fail(err, EBADMSG);
        db->writer->pages += used[i].count - PV_VAD_SLOTS;
        if (used[i].first > next &&
            runs_insert(db->writer, db->writer->count, (struct run){next, used[i].first - next}, err))
            return -1;
        next = used[i].first + used[i].count;
    }
    if (next < db->slot_count)
        return runs_insert(db->writer, db->writer->count, (struct run){next, db->slot_count - next}, err);
    return 0;
}

static int start_writing(struct pv_pfdb *db, int *err)
{
    db->writer = calloc(1, sizeof *db->writer);
    if (!db->writer)
        return fail(err, ENOMEM);
    db->writer->next_vad = 1;
    db->writer->huge = slots_at(db->max_vads);
    return derive_free_runs(db, err);
}

/* The whole file at an address that suits huge pages. MAP_FAILED and errno when it cannot be. */
static void *map_aligned(int fd, size_t size, int protection)
{
    char *room = mmap(NULL, size + HUGE_PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    char *start, *end, *map;
    int error;

    if (room == MAP_FAILED)
        return MAP_FAILED;
    start = (char *)(((uintptr_t)room + HUGE_PAGE - 1) & ~(uintptr_t)(HUGE_PAGE - 1));
    end = start + round_page(size);
    map = mmap(start, size, protection, MAP_SHARED | MAP_FIXED, fd, 0);
    error = errno;
    if (map == MAP_FAILED)
        end = start;
    if (start > room)
        munmap(room, (size_t)(start - room));
    if (room + size + HUGE_PAGE > end)
        munmap(end, (size_t)(room + size + HUGE_PAGE - end));
    errno = error;
    return map;
}

/* Makes huge pages of the slots before `end`, of which all are or were in use. Best effort. */
static void collapse(struct pv_pfdb *db, uint32_t end)
{
    size_t whole = (slots_at(db->max_vads) + (size_t)end * sizeof(pv_pfe)) & ~(HUGE_PAGE - 1), done = db->writer->huge;

    if (whole > done) {
        madvise((char *)db->map + done, whole - done, MADV_COLLAPSE);
        db->writer->huge = whole;
    }
}

static struct pv_pfdb *map_file(int fd, int writer, uint32_t max_vads, uint32_t max_pfes, int *err)
{
    struct pv_pfdb *db = calloc(1, sizeof *db);

    if (!db) {
        *err = ENOMEM;
        return NULL;
    }
    db->max_vads = max_vads;
    db->max_pfes = max_pfes;
    db->map_size = file_size(max_vads, max_pfes);
    db->map = map_aligned(fd, db->map_size, writer ? PROT_READ | PROT_WRITE : PROT_READ);
    if (db->map == MAP_FAILED) {
        *err = errno;
        free(db);
        return NULL;
    }
    db->directory = (_Atomic(uint32_t) *)((char *)db->map + PV_PAGE_SIZE);
    db->slots = (pv_pfe *)((char *)db->map + slots_at(max_vads));
    db->slot_count = (uint32_t)slots_for(max_vads, max_pfes);
    return db;
}

int pv_pfdb_create(int fd, uint32_t max_vads, uint32_t max_pfes, struct pv_pfdb **out, int *err)
{
    struct pv_pfdb *db;

    if (!numbers_are_sane(max_vads, max_pfes))
        return fail(err, EINVAL);
    if (ftruncate(fd, 0) || ftruncate(fd, (off_t)file_size(max_vads, max_pfes)))
        return fail(err, errno);
    db = map_file(fd, 1, max_vads, max_pfes, err);
    if (!db)
        return -1;
    *(struct header *)db->map = (struct header){MAGIC, max_vads, max_pfes};
    if (start_writing(db, err)) {
        pv_pfdb_close(db);
        return -1;
    }
    *out = db;
    return 0;
}

int pv_pfdb_open(int fd, int writer, struct pv_pfdb **out, int *err)
{
    struct header header;
    struct stat status;
    struct pv_pfdb *db;

    if (fstat(fd, &status))
        return fail(err, errno);
    if (pread(fd, &header, sizeof header, 0) != sizeof header || header.magic != MAGIC ||
        !numbers_are_sane(header.max_vads, header.max_pfes) ||
        (size_t)status.st_size < file_size(header.max_vads, header.max_pfes))
        return fail(err, EBADMSG);
    db = map_file(fd, writer, header.max_vads, header.max_pfes, err);
    if (!db)
        return -1;
    if (writer && start_writing(db, err)) {
        pv_pfdb_close(db);
        return -1;
    }
    *out = db;
    return 0;
}

void pv_pfdb_close(struct pv_pfdb *db)
{
    if (!db)
        return;
    if (db->writer) {
        free(db->writer->runs);
        free(db->writer);
    }
    munmap(db->map, db->map_size);
    free(db);
}

static int find_free_vad(struct pv_pfdb *db, uint32_t *vad)
{
    for (uint32_t i = 0; i < db->max_vads - 1; i++) {
        uint32_t v = 1 + (db->writer->next_vad - 1 + i) % (db->max_vads - 1);

        if (!atomic_load_explicit(&db->directory[v], memory_order_relaxed)) {
            *vad = v;
            return 0;
        }
    }
    return -1;
}

int pv_pfdb_add(struct pv_pfdb *db, enum pv_source_kind kind, uint32_t source, uint64_t offset, uint32_t pages,
                uint32_t *number, int *err)
{
    struct pv_vad *vad;
    uint32_t index, slot;

    if (!pages || kind < PV_SOURCE_ZERO || kind > PV_SOURCE_REMOTE || source >= PV_VAD_SOURCES ||
        offset % PV_PAGE_SIZE || offset >> PV_PAGE_SHIFT > (UINT64_C(1) << PV_VAD_OFFSET_BITS) - pages)
        return fail(err, EINVAL);
    if (pages >= db->max_pfes - db->writer->pages || find_free_vad(db, &index) ||
        runs_take(db->writer, pages + PV_VAD_SLOTS, &slot))
        return fail(err, ENOSPC);
    vad = pv_pfdb_vad_at(db, slot);
    vad->where = offset >> PV_PAGE_SHIFT | (uint64_t)source << PV_VAD_OFFSET_BITS | (uint64_t)kind << 60;
    vad->number = index;
    atomic_store_explicit(&vad->pages, pages, memory_order_relaxed);
    for (uint32_t i = 0; i < pages; i++)
        atomic_store_explicit(&db->slots[slot + PV_VAD_SLOTS + i], pv_pfe_make(slot, PV_PFE_ABSENT, 0),
                              memory_order_relaxed);
    atomic_store_explicit(&db->directory[index], slot, memory_order_release);
    db->writer->next_vad = index + 1 < db->max_vads ? index + 1 : 1;
    db->writer->pages += pages;
    collapse(db, slot + PV_VAD_SLOTS + pages);
    *number = index;
    return 0;
}

int pv_pfdb_remove(struct pv_pfdb *db, uint32_t number, int *err)
{
    struct pv_vad *vad = pv_pfdb_vad(db, number);
    struct run run;

    if (!vad || !run_of(db, number, &run))
        return fail(err, ENOENT);
    if (runs_give(db->writer, run, err))
        return -1;
    atomic_store_explicit(&db->directory[number], 0, memory_order_release);
    atomic_store_explicit(&vad->pages, 0, memory_order_release);
    db->writer->pages -= run.count - PV_VAD_SLOTS;
    return 0;
}

void pv_pfdb_usage(const struct pv_pfdb *db, struct pv_pfdb_usage *out)
{
    *out = (struct pv_pfdb_usage){.free_runs = db->writer ? db->writer->count : 0};
    for (uint32_t v = 1; v < db->max_vads; v++) {
        const struct pv_vad *vad = pv_pfdb_vad(db, v);

        out->vads += vad != NULL;
        out->pfes += vad ? atomic_load_explicit(&vad->pages, memory_order_relaxed) : 0;
    }
    out->vad_bytes = out->vads * (sizeof(struct pv_vad) + sizeof(uint32_t));
    out->pfe_bytes = out->pfes * sizeof(pv_pfe);
}
