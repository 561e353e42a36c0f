/* See space.h for the theory of operation. */
#include "walk.h"

#include <errno.h>
#include <linux/membarrier.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "../common/cleanup.h"

#define FANOUT PV_WALK_FANOUT
#define PAGES_TOTAL (UINT64_C(1) << (PV_SPACE_BITS - PV_PAGE_SHIFT))
#define CHUNK (2u << 20)
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

struct pv_reader {
    _Alignas(64) _Atomic(uint64_t) section; /* the space's epoch when the section began; 0 outside of sections */
    _Atomic(int) taken;
};

/* Nodes are cut off 2 MiB chunks and live as long as the space. The first word of a chunk links to the one before it. */
struct arena {
    char *chunk;
    size_t used;
    int huge; /* the newest chunk is a huge page already */
    uint64_t bytes;
};

/* What stands for "nothing below": an inner node for each level above the leaves, the topmost also for a root's children. */
static struct {
    pthread_once_t once;
    struct pv_leaf leaf;
    struct pv_inner inner[3]; /* [level], 1 and 2 in use */
} empty = {.once = PTHREAD_ONCE_INIT};

struct pv_space {
    struct pv_walk walk;
    struct pv_inner root;
    _Atomic(uint64_t) epoch;
    int needs_fence; /* no membarrier here: readers pay for a fence */
    pthread_mutex_t mappers;
    struct arena arena;
    uint64_t nodes, mapped;
    struct pv_reader readers[PV_SPACE_READERS];
};

static int fail(int *err, int code)
{
    *err = code;
    return -1;
}

/* ---- memory for nodes ------------------------------------------------------------------------------------------------ */

static int arena_grow(struct arena *arena)
{
    /* Twice the size, then the ends are cut off: a huge page must be aligned. */
    char *map = mmap(NULL, 2 * CHUNK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    char *start;

    if (map == MAP_FAILED)
        return -1;
    start = (char *)(((uintptr_t)map + CHUNK - 1) & ~(uintptr_t)(CHUNK - 1));
    if (start > map)
        munmap(map, (size_t)(start - map));
    munmap(start + CHUNK, (size_t)(map + CHUNK - start));
    *(char **)start = arena->chunk;
    arena->chunk = start;
    arena->used = 64;
    arena->huge = 0;
    return 0;
}

/* Only once half of it is used: a small VM's table shall not cost 2 MiB. Best effort. */
static void arena_collapse(struct arena *arena)
{
    if (!arena->huge && arena->used >= CHUNK / 2) {
        madvise(arena->chunk, CHUNK, MADV_COLLAPSE);
        arena->huge = 1;
    }
}

static void *arena_take(struct pv_space *space, size_t size)
{
    struct arena *arena = &space->arena;
    void *node;

    if ((!arena->chunk || arena->used + size > CHUNK) && arena_grow(arena))
        return NULL;
    arena_collapse(arena);
    node = arena->chunk + arena->used; /* fresh anonymous memory: zero */
    arena->used += size;
    arena->bytes += size;
    space->nodes++;
    return node;
}

static void arena_free(struct arena *arena)
{
    while (arena->chunk) {
        char *before = *(char **)arena->chunk;

        munmap(arena->chunk, CHUNK);
        arena->chunk = before;
    }
}

/* ---- readers --------------------------------------------------------------------------------------------------------- */

static int membarrier(int command)
{
#if defined(__SANITIZE_THREAD__)
    (void)command;
    return -1; /* the sanitizer cannot see this barrier; it sees the fences of the other way */
#else
#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
    (void)command;
    return -1;
#endif
#endif
    return (int)syscall(SYS_membarrier, command, 0, 0);
#endif
}

int pv_space_add_reader(struct pv_space *space, struct pv_reader **out, int *err)
{
    for (int i = 0; i < PV_SPACE_READERS; i++) {
        int expected = 0;

        if (atomic_compare_exchange_strong(&space->readers[i].taken, &expected, 1)) {
            *out = &space->readers[i];
            return 0;
        }
    }
    return fail(err, EAGAIN);
}

void pv_space_remove_reader(struct pv_space *space, struct pv_reader *reader)
{
    (void)space;
    atomic_store(&reader->section, 0);
    atomic_store(&reader->taken, 0);
}

void pv_space_read_lock(struct pv_space *space, struct pv_reader *reader)
{
    uint64_t epoch = atomic_load_explicit(&space->epoch, memory_order_acquire);

    if (space->needs_fence) {
        /* An exchange is a full barrier that the thread sanitizer understands as well. */
        atomic_exchange_explicit(&reader->section, epoch, memory_order_seq_cst);
    } else {
        atomic_store_explicit(&reader->section, epoch, memory_order_relaxed);
        atomic_signal_fence(memory_order_seq_cst); /* the mapper's membarrier is the other half */
    }
}

void pv_space_read_unlock(struct pv_reader *reader)
{
    atomic_store_explicit(&reader->section, 0, memory_order_release);
}

/* Returns when every section that had begun before the call has ended. Sections that begin later see what was unpublished. */
static void wait_for_readers(struct pv_space *space)
{
    uint64_t epoch = atomic_fetch_add(&space->epoch, 1) + 1;

    if (!space->needs_fence)
        membarrier(MEMBARRIER_CMD_PRIVATE_EXPEDITED);
    for (int i = 0; i < PV_SPACE_READERS; i++) {
        uint64_t section;

        while ((section = atomic_load(&space->readers[i].section)) && section < epoch)
            sched_yield(); /* sections are short: a walk and one copy */
    }
}

/* ---- the walk -------------------------------------------------------------------------------------------------------- */

static void *empty_below(int level)
{
    return level > 1 ? (void *)&empty.inner[level - 1] : (void *)&empty.leaf;
}

static void clear_inner(struct pv_inner *node, int level)
{
    for (unsigned i = 0; i < FANOUT; i++)
        atomic_store_explicit(&node->child[i], empty_below(level), memory_order_relaxed);
}

static void make_empty(void)
{
    clear_inner(&empty.inner[1], 1);
    clear_inner(&empty.inner[2], 2);
}

static inline struct pv_leaf *find_leaf(const struct pv_space *space, uint64_t address)
{
    return pv_walk_leaf(&space->walk, address);
}

int pv_space_lookup(const struct pv_space *space, uint64_t address, struct pv_translation *out)
{
    return pv_walk_lookup(&space->walk, address, out);
}

/* ---- mapping --------------------------------------------------------------------------------------------------------- */

/* A page-aligned range of at least one page inside the space. */
static int check_range(uint64_t address, uint64_t pages, int *err)
{
    if (address % PV_PAGE_SIZE || !pages || address >> PV_SPACE_BITS ||
        pages > PAGES_TOTAL - (address >> PV_PAGE_SHIFT))
        return fail(err, EINVAL);
    return 0;
}

static void *make_node(struct pv_space *space, int level)
{
    void *node = arena_take(space, level ? sizeof(struct pv_inner) : sizeof(struct pv_leaf));

    if (node && level)
        clear_inner(node, level);
    return node;
}

static struct pv_leaf *make_leaf(struct pv_space *space, uint64_t address)
{
    struct pv_inner *node = &space->root;

    for (int level = 3; level >= 1; level--) {
        _Atomic(void *) *place = &node->child[pv_walk_index(address, level)];
        void *child = atomic_load_explicit(place, memory_order_relaxed);

        if (child == empty_below(level)) {
            child = make_node(space, level - 1);
            if (!child)
                return NULL;
            atomic_store_explicit(place, child, memory_order_release);
        }
        node = child;
    }
    return (struct pv_leaf *)node;
}

/* Pages from `address` to the end of its leaf, `pages` at most. */
static uint64_t pages_in_leaf(uint64_t address, uint64_t pages)
{
    uint64_t room = FANOUT - pv_walk_index(address, 0);

    return pages < room ? pages : room;
}

/* Every leaf made, every page free? Leaves that were made stay: they are empty, and the next mapping finds them. */
static int prepare(struct pv_space *space, uint64_t address, uint64_t pages, int *err)
{
    while (pages) {
        uint64_t here = pages_in_leaf(address, pages);
        struct pv_leaf *leaf = make_leaf(space, address);

        if (!leaf)
            return fail(err, ENOMEM);
        for (uint64_t i = 0; i < here; i++)
            if (atomic_load_explicit(&leaf->pfe[pv_walk_index(address, 0) + i], memory_order_relaxed))
                return fail(err, EEXIST);
        address += here << PV_PAGE_SHIFT;
        pages -= here;
    }
    return 0;
}

static void fill(struct pv_space *space, uint64_t address, uint64_t pages, uint32_t pfe)
{
    while (pages) {
        uint64_t here = pages_in_leaf(address, pages);
        struct pv_leaf *leaf = find_leaf(space, address);

        for (uint64_t i = 0; i < here; i++)
            atomic_store_explicit(&leaf->pfe[pv_walk_index(address, 0) + i], pfe++, memory_order_release);
        address += here << PV_PAGE_SHIFT;
        pages -= here;
    }
}

int pv_space_map(struct pv_space *space, uint64_t address, uint64_t pages, uint32_t vad, uint32_t page, int *err)
{
    const struct pv_vad *source = pv_pfdb_vad(space->walk.db, vad);
    uint32_t vad_pages;
    int result;

    if (check_range(address, pages, err))
        return -1;
    if (!source)
        return fail(err, ENOENT);
    vad_pages = atomic_load_explicit(&source->pages, memory_order_relaxed);
    if (page >= vad_pages || pages > vad_pages - page)
        return fail(err, EINVAL);
    pthread_mutex_lock(&space->mappers);
    result = prepare(space, address, pages, err);
    if (!result) {
        fill(space, address, pages, pv_pfdb_first_pfe(space->walk.db, source) + page);
        space->mapped += pages;
    }
    pthread_mutex_unlock(&space->mappers);
    return result;
}

/* The start of the next leaf-sized block after `address`. */
static uint64_t next_block(uint64_t address)
{
    return ((address >> (PV_PAGE_SHIFT + PV_WALK_LEVEL_BITS)) + 1) << (PV_PAGE_SHIFT + PV_WALK_LEVEL_BITS);
}

/* The first address >= `address` whose leaf exists, or 1 << PV_SPACE_BITS. Skips absent subtrees whole. */
static uint64_t next_leaf(const struct pv_space *space, uint64_t address)
{
    while (address < UINT64_C(1) << PV_SPACE_BITS) {
        const struct pv_inner *node = &space->root;
        int level = 3;

        for (; level >= 1; level--) {
            const void *child = atomic_load_explicit(&node->child[pv_walk_index(address, level)], memory_order_acquire);

            if (child == empty_below(level))
                break;
            node = child;
        }
        if (!level)
            return address;
        int shift = PV_PAGE_SHIFT + PV_WALK_LEVEL_BITS * level;
        address = ((address >> shift) + 1) << shift;
    }
    return UINT64_C(1) << PV_SPACE_BITS;
}

int pv_space_unmap(struct pv_space *space, uint64_t address, uint64_t pages, uint64_t *unmapped, int *err)
{
    uint64_t end = address + (pages << PV_PAGE_SHIFT), count = 0;

    if (check_range(address, pages, err))
        return -1;
    pthread_mutex_lock(&space->mappers);
    while ((address = next_leaf(space, address)) < end) {
        uint64_t here = pages_in_leaf(address, (end - address) >> PV_PAGE_SHIFT);
        struct pv_leaf *leaf = find_leaf(space, address);

        for (uint64_t i = 0; i < here; i++)
            count += atomic_exchange_explicit(&leaf->pfe[pv_walk_index(address, 0) + i], 0, memory_order_seq_cst) != 0;
        address = next_block(address);
    }
    space->mapped -= count;
    if (count)
        wait_for_readers(space);
    pthread_mutex_unlock(&space->mappers);
    *unmapped = count;
    return 0;
}

/* ---- looking at a space ---------------------------------------------------------------------------------------------- */

static int translate(struct pv_space *space, uint64_t address, struct pv_extent *out)
{
    struct pv_translation found;

    if (!pv_space_lookup(space, address, &found))
        return 0;
    *out = (struct pv_extent){address, 1, found.vad->number, found.page};
    return 1;
}

static int first_mapped(struct pv_space *space, uint64_t address, struct pv_extent *out)
{
    while ((address = next_leaf(space, address)) < UINT64_C(1) << PV_SPACE_BITS) {
        for (uint64_t end = next_block(address); address < end; address += PV_PAGE_SIZE)
            if (translate(space, address, out))
                return 1;
    }
    return 0;
}

int pv_space_next(struct pv_space *space, uint64_t address, struct pv_extent *out, int *err)
{
    struct pv_extent next;
    int found;

    if (address % PV_PAGE_SIZE)
        return fail(err, EINVAL);
    pthread_mutex_lock(&space->mappers);
    found = first_mapped(space, address, out);
    while (found && translate(space, out->address + (out->pages << PV_PAGE_SHIFT), &next) && next.vad == out->vad &&
           next.page == out->page + out->pages)
        out->pages++;
    pthread_mutex_unlock(&space->mappers);
    return found;
}

void pv_space_usage(struct pv_space *space, struct pv_space_usage *out)
{
    pthread_mutex_lock(&space->mappers);
    *out = (struct pv_space_usage){space->nodes, space->arena.bytes, space->mapped};
    pthread_mutex_unlock(&space->mappers);
}

int pv_space_create(const struct pv_pfdb *db, struct pv_space **out, int *err)
{
    struct pv_space *space = aligned_alloc(64, (sizeof *space + 63) & ~(size_t)63);

    if (!space)
        return fail(err, ENOMEM);
    pthread_once(&empty.once, make_empty);
    memset(space, 0, sizeof *space);
    clear_inner(&space->root, 3);
    space->walk = (struct pv_walk){db, db->slots, &space->root};
    atomic_store(&space->epoch, 1);
    space->needs_fence = membarrier(MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED) != 0;
    pthread_mutex_init(&space->mappers, NULL);
    *out = space;
    return 0;
}

void pv_space_destroy(struct pv_space *space)
{
    if (!space)
        return;
    arena_free(&space->arena);
    pthread_mutex_destroy(&space->mappers);
    free(space);
}
