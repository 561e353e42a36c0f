/* See space.h for the theory of operation. */
#include "space.h"

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

#define FANOUT 512u
#define LEVEL_BITS 9
#define PAGES_TOTAL (UINT64_C(1) << (PV_SPACE_BITS - PV_PAGE_SHIFT))
#define CHUNK (2u << 20)

struct leaf {
    _Atomic(uint32_t) pfe[FANOUT];
};

struct inner {
    _Atomic(void *) child[FANOUT];
};

struct pv_reader {
    _Alignas(64) _Atomic(uint64_t) section; /* the space's epoch when the section began; 0 outside of sections */
    _Atomic(int) taken;
};

/* Nodes are cut off 2 MiB chunks and live as long as the space. The first word of a chunk links to the one before it. */
struct arena {
    char *chunk;
    size_t used;
    uint64_t bytes;
};

struct pv_space {
    const struct pv_pfdb *db;
    struct inner root;
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
    /* Only from the second chunk on: a small VM's table shall not cost 2 MiB. */
    if (arena->chunk)
        madvise(start, CHUNK, MADV_HUGEPAGE);
    *(char **)start = arena->chunk;
    arena->chunk = start;
    arena->used = 64;
    return 0;
}

static void *arena_take(struct pv_space *space, size_t size)
{
    struct arena *arena = &space->arena;
    void *node;

    if ((!arena->chunk || arena->used + size > CHUNK) && arena_grow(arena))
        return NULL;
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

static inline unsigned index_at(uint64_t address, int level)
{
    return (unsigned)(address >> (PV_PAGE_SHIFT + LEVEL_BITS * level)) & (FANOUT - 1);
}

static inline struct leaf *find_leaf(const struct pv_space *space, uint64_t address)
{
    const struct inner *node = &space->root;

    for (int level = 3; level >= 1; level--) {
        node = atomic_load_explicit(&node->child[index_at(address, level)], memory_order_acquire);
        if (!node)
            return NULL;
    }
    return (struct leaf *)node;
}

int pv_space_lookup(const struct pv_space *space, uint64_t address, struct pv_translation *out)
{
    const struct pv_pfdb *db = space->db;
    const struct leaf *leaf;
    uint32_t pfe;

    if (address >> PV_SPACE_BITS)
        return 0;
    leaf = find_leaf(space, address);
    if (!leaf)
        return 0;
    pfe = atomic_load_explicit(&leaf->pfe[index_at(address, 0)], memory_order_acquire);
    if (!pfe)
        return 0;
    out->vad = &db->vads[pv_pfe_vad(atomic_load_explicit(&db->pfes[pfe], memory_order_relaxed))];
    out->pfe = pfe;
    out->page = pfe - out->vad->first_pfe;
    return 1;
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

static struct leaf *make_leaf(struct pv_space *space, uint64_t address)
{
    struct inner *node = &space->root;

    for (int level = 3; level >= 1; level--) {
        _Atomic(void *) *slot = &node->child[index_at(address, level)];
        void *child = atomic_load_explicit(slot, memory_order_relaxed);

        if (!child) {
            child = arena_take(space, level > 1 ? sizeof(struct inner) : sizeof(struct leaf));
            if (!child)
                return NULL;
            atomic_store_explicit(slot, child, memory_order_release);
        }
        node = child;
    }
    return (struct leaf *)node;
}

/* Pages from `address` to the end of its leaf, `pages` at most. */
static uint64_t pages_in_leaf(uint64_t address, uint64_t pages)
{
    uint64_t room = FANOUT - index_at(address, 0);

    return pages < room ? pages : room;
}

/* Every leaf made, every page free? Leaves that were made stay: they are empty, and the next mapping finds them. */
static int prepare(struct pv_space *space, uint64_t address, uint64_t pages, int *err)
{
    while (pages) {
        uint64_t here = pages_in_leaf(address, pages);
        struct leaf *leaf = make_leaf(space, address);

        if (!leaf)
            return fail(err, ENOMEM);
        for (uint64_t i = 0; i < here; i++)
            if (atomic_load_explicit(&leaf->pfe[index_at(address, 0) + i], memory_order_relaxed))
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
        struct leaf *leaf = find_leaf(space, address);

        for (uint64_t i = 0; i < here; i++)
            atomic_store_explicit(&leaf->pfe[index_at(address, 0) + i], pfe++, memory_order_release);
        address += here << PV_PAGE_SHIFT;
        pages -= here;
    }
}

int pv_space_map(struct pv_space *space, uint64_t address, uint64_t pages, uint32_t vad, uint32_t page, int *err)
{
    uint32_t vad_pages;
    int result;

    if (check_range(address, pages, err))
        return -1;
    if (!vad || vad >= space->db->max_vads)
        return fail(err, ENOENT);
    vad_pages = atomic_load_explicit(&space->db->vads[vad].pages, memory_order_acquire);
    if (!vad_pages)
        return fail(err, ENOENT);
    if (page >= vad_pages || pages > vad_pages - page)
        return fail(err, EINVAL);
    pthread_mutex_lock(&space->mappers);
    result = prepare(space, address, pages, err);
    if (!result) {
        fill(space, address, pages, space->db->vads[vad].first_pfe + page);
        space->mapped += pages;
    }
    pthread_mutex_unlock(&space->mappers);
    return result;
}

/* The start of the next leaf-sized block after `address`. */
static uint64_t next_block(uint64_t address)
{
    return ((address >> (PV_PAGE_SHIFT + LEVEL_BITS)) + 1) << (PV_PAGE_SHIFT + LEVEL_BITS);
}

/* The first address >= `address` whose leaf exists, or 1 << PV_SPACE_BITS. Skips absent subtrees whole. */
static uint64_t next_leaf(const struct pv_space *space, uint64_t address)
{
    while (address < UINT64_C(1) << PV_SPACE_BITS) {
        const struct inner *node = &space->root;
        int level = 3;

        for (; level >= 1; level--) {
            const void *child = atomic_load_explicit(&node->child[index_at(address, level)], memory_order_acquire);

            if (!child)
                break;
            node = child;
        }
        if (!level)
            return address;
        int shift = PV_PAGE_SHIFT + LEVEL_BITS * level;
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
        struct leaf *leaf = find_leaf(space, address);

        for (uint64_t i = 0; i < here; i++)
            count += atomic_exchange_explicit(&leaf->pfe[index_at(address, 0) + i], 0, memory_order_seq_cst) != 0;
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
    *out = (struct pv_extent){address, 1, (uint32_t)(found.vad - space->db->vads), found.page};
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
    memset(space, 0, sizeof *space);
    space->db = db;
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
