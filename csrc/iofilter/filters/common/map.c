/* The life of a map: its files, opening, closing, pages. The way to the disk is in map_sync.c; the theory in map.h. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common/cleanup.h"
#include "crc32c.h"
#include "map_rooms.h"

#define LIVE_HEAD 4096

struct live_head {
    char magic[8], boot[40];
    uint8_t id[16];
    uint32_t crc;
};

static const char live_magic[8] = "PVLIVE1";

const char *pv_boot_id_for_tests;
unsigned pv_map_patience_ms = 5000;

static char boot_id[40]; /* empty: never trusted, see live_is_good */

/* When the library is loaded: a device process is in a root of its own, without /proc, before it opens its disks. */
__attribute__((constructor)) static void learn_boot_id(void)
{
    cleanup_fd int fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);

    if (fd < 0 || read(fd, boot_id, 36) != 36)
        memset(boot_id, 0, sizeof boot_id);
}

static void read_boot_id(char boot[40])
{
    const char *from = pv_boot_id_for_tests ? pv_boot_id_for_tests : boot_id;

    memset(boot, 0, 40);
    memcpy(boot, from, strnlen(from, 39));
}

/* ---- slots ---- */

void pv_map_seal(struct pv_slot *slot, uint64_t index, uint32_t generation)
{
    slot->magic = PV_SLOT_MAGIC;
    slot->index = index;
    slot->generation = generation;
    slot->crc = pv_crc32c(0, (uint8_t *)slot + 8, sizeof *slot - 8);
}

static bool slot_is_good(const struct pv_slot *slot, uint64_t index)
{
    return slot->magic == PV_SLOT_MAGIC && slot->index == index &&
           slot->crc == pv_crc32c(0, (const uint8_t *)slot + 8, sizeof *slot - 8);
}

static bool is_blank(const struct pv_slot *slot)
{
    const uint8_t *bytes = (const uint8_t *)slot;

    return !bytes[0] && !memcmp(bytes, bytes + 1, sizeof *slot - 1);
}

static bool newer(uint32_t a, uint32_t b)
{
    return (int32_t)(a - b) > 0;
}

/* The newer of the two good slots in `pair`; -1: none was ever written; -2: both are damaged. */
static int choose(const struct pv_slot pair[2], uint64_t index)
{
    bool good[2] = {slot_is_good(&pair[0], index), slot_is_good(&pair[1], index)};

    if (good[0] && good[1])
        return newer(pair[1].generation, pair[0].generation);
    if (good[0] || good[1])
        return good[1];
    /* A first write that was torn leaves one blank; then nothing had been promised. */
    return is_blank(&pair[0]) || is_blank(&pair[1]) ? -1 : -2;
}

static int read_pair(int fd, uint64_t index, struct pv_slot pair[2])
{
    ssize_t got = pread(fd, pair, 2 * sizeof *pair, (off_t)(index * 2 * PV_SLOT));

    if (got < 0)
        return -1;
    memset((uint8_t *)pair + got, 0, 2 * sizeof *pair - (size_t)got);
    return 0;
}

static uint64_t pages_of(uint64_t bytes)
{
    return (bytes + PV_MAP_PAGE - 1) / PV_MAP_PAGE;
}

static uint64_t state_size(uint64_t pages)
{
    return (pages + 1) * 2 * PV_SLOT;
}

/* ---- create ---- */

static int write_head(int fd, const struct pv_map_head *head, uint32_t generation)
{
    struct pv_slot slot = {0};

    memcpy(slot.payload, head, sizeof *head);
    pv_map_seal(&slot, 0, generation);
    if (pwrite(fd, &slot, sizeof slot, (off_t)(generation % 2 * PV_SLOT)) != sizeof slot)
        return -1;
    return 0;
}

int pv_map_create(const char *path, const char *kind, uint64_t bytes, const uint64_t words[PV_MAP_WORDS], unsigned how,
    struct pv_fail *fail)
{
    struct pv_map_head head = {.version = PV_MAP_VERSION, .in_use = how & PV_MAP_LOST, .bytes = bytes};
    cleanup_fd int fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);

    if (fd < 0)
        return pv_fail(fail, errno, "state %.150s: %s", path, strerror(errno));
    strncpy(head.kind, kind, sizeof head.kind - 1);
    memcpy(head.words, words, sizeof head.words);
    if (getrandom(head.id, sizeof head.id, 0) != sizeof head.id || ftruncate(fd, (off_t)state_size(pages_of(bytes))) ||
        write_head(fd, &head, 0) || (!(how & PV_MAP_UNSYNCED) && fdatasync(fd))) {
        pv_fail(fail, errno, "state %.150s: %s", path, strerror(errno));
        unlink(path);
        return -1;
    }
    return 0;
}

/* ---- open: the durable copy ---- */

static int read_head(struct pv_map *map, const char *path, const char *kind, struct pv_fail *fail)
{
    struct pv_slot pair[2];
    int which;

    if (read_pair(map->fd, 0, pair))
        return pv_fail(fail, errno, "state %.150s: %s", path, strerror(errno));
    which = choose(pair, 0);
    if (which < 0)
        return pv_fail(fail, EINVAL, "state %.150s: no state file of a filter, or its head is damaged", path);
    memcpy(&map->head, pair[which].payload, sizeof map->head);
    map->head_generation = pair[which].generation;
    if (strncmp(map->head.kind, kind, sizeof map->head.kind))
        return pv_fail(fail, EINVAL, "state %.120s: belongs to a filter %.15s, not to %s", path, map->head.kind, kind);
    if (map->head.version > PV_MAP_VERSION)
        return pv_fail(fail, ENOTSUP, "state %.120s: has version %u, this program knows %u: use a newer one", path, map->head.version,
            PV_MAP_VERSION);
    if (map->head.bytes > PV_MAP_BYTES_MAX)
        return pv_fail(fail, EINVAL, "state %.150s: its head has an impossible size", path);
    return 0;
}

/* A process that was killed is gone before its last references to files are: the kernel's io_uring drops them a little later. */
static int lock_state(int fd)
{
    uint64_t give_up = pv_loop_clock_ns() + (uint64_t)pv_map_patience_ms * 1000000;

    while (flock(fd, LOCK_EX | LOCK_NB)) {
        if (errno != EWOULDBLOCK || pv_loop_clock_ns() > give_up)
            return -1;
        usleep(2000);
    }
    return 0;
}

static int open_state(struct pv_map *map, const char *path, const char *kind, struct pv_fail *fail)
{
    map->fd = open(path, O_RDWR | O_CLOEXEC);
    if (map->fd < 0)
        return pv_fail(fail, errno, "state %.150s: %s", path, strerror(errno));
    if (lock_state(map->fd))
        return pv_fail(fail, EBUSY, "state %.150s: another process has this disk open", path);
    return read_head(map, path, kind, fail);
}

static int load_page(struct pv_map *map, uint64_t page, bool into_live, struct pv_fail *fail)
{
    struct pv_slot pair[2];
    int which, error;

    if (read_pair(map->fd, page + 1, pair))
        return pv_fail(fail, errno, "state of %s, page %llu: %s", map->head.kind, (unsigned long long)page, strerror(errno));
    which = choose(pair, page + 1);
    if (which == -2)
        return pv_fail(fail, EIO, "state of %s, page %llu: both copies are damaged", map->head.kind, (unsigned long long)page);
    if (which == -1)
        return 0;
    map->pages[page].generation = pair[which].generation;
    map->pages[page].flags |= PV_PAGE_WRITTEN | (which ? PV_PAGE_SECOND : 0);
    if (pair[which].marked)
        map->pages[page].flags |= PV_PAGE_MARK | PV_PAGE_MARKED | (into_live && map->lost_power ? PV_PAGE_DOUBT : 0);
    if (into_live) {
        error = pv_map_back(map, page);
        if (error)
            return pv_fail(fail, error, "live state of %s: %s", map->head.kind, strerror(error));
        memcpy(map->live + page * PV_MAP_PAGE, pair[which].payload, PV_MAP_PAGE);
    } else if (!(map->pages[page].flags & PV_PAGE_BACKED) || memcmp(map->live + page * PV_MAP_PAGE, pair[which].payload, PV_MAP_PAGE)) {
        pv_map_note(map, page);
    }
    return 0;
}

/* Every page that the state file has anything of. */
static int load_pages(struct pv_map *map, bool into_live, struct pv_fail *fail)
{
    off_t end = (off_t)state_size(map->count);

    for (off_t at = 2 * PV_SLOT; at < end;) {
        off_t data = lseek(map->fd, at, SEEK_DATA);

        if (data < 0)
            break; /* ENXIO: only a hole is left */
        if (data >= end)
            break;
        at = data / (2 * PV_SLOT) * (2 * PV_SLOT);
        if (load_page(map, (uint64_t)at / (2 * PV_SLOT) - 1, into_live, fail))
            return -1;
        at += 2 * PV_SLOT;
    }
    return 0;
}

/* ---- open: the live copy ---- */

static int map_live(struct pv_map *map, int fd, struct pv_fail *fail)
{
    map->live_size = map->count * PV_MAP_PAGE;
    if (ftruncate(fd, (off_t)(LIVE_HEAD + map->live_size)))
        return pv_fail(fail, errno, "%.150s: %s", map->live_path, strerror(errno));
    map->live = mmap(NULL, map->live_size ? map->live_size : 1, PROT_READ | PROT_WRITE, MAP_SHARED, fd, LIVE_HEAD);
    if (map->live == MAP_FAILED) {
        map->live = NULL;
        return pv_fail(fail, errno, "%.150s: %s", map->live_path, strerror(errno));
    }
    map->live_fd = fd;
    return 0;
}

static bool live_is_good(const struct pv_map *map, int fd)
{
    struct live_head head;
    char boot[40];

    read_boot_id(boot);
    return boot[0] && pread(fd, &head, sizeof head, 0) == sizeof head && !memcmp(head.magic, live_magic, sizeof head.magic) &&
           head.crc == pv_crc32c(0, &head, offsetof(struct live_head, crc)) && !memcmp(head.boot, boot, sizeof boot) &&
           !memcmp(head.id, map->head.id, sizeof head.id);
}

/* Pages of the live file that are no holes. */
static void find_backed(struct pv_map *map)
{
    off_t end = (off_t)(LIVE_HEAD + map->live_size);

    for (off_t at = LIVE_HEAD; at < end;) {
        off_t data = lseek(map->live_fd, at, SEEK_DATA), hole;

        if (data < 0 || data >= end)
            return;
        hole = lseek(map->live_fd, data, SEEK_HOLE);
        if (hole < 0 || hole > end)
            hole = end;
        for (off_t page = (data - LIVE_HEAD) / PV_MAP_PAGE; page * (off_t)PV_MAP_PAGE < hole - LIVE_HEAD; page++)
            map->pages[page].flags |= PV_PAGE_BACKED;
        at = hole;
    }
}

static int reuse_live(struct pv_map *map, int fd, struct pv_fail *fail)
{
    if (map_live(map, fd, fail))
        return -1;
    find_backed(map);
    if (load_pages(map, false, fail))
        return -1;
    for (uint64_t page = 0; page < map->count; page++) /* changed, and never in the state file */
        if ((map->pages[page].flags & (PV_PAGE_BACKED | PV_PAGE_WRITTEN)) == PV_PAGE_BACKED)
            pv_map_note(map, page);
    return 0;
}

static int write_live_head(const struct pv_map *map, int fd)
{
    struct live_head head = {0};

    memcpy(head.magic, live_magic, sizeof head.magic);
    read_boot_id(head.boot);
    memcpy(head.id, map->head.id, sizeof head.id);
    head.crc = pv_crc32c(0, &head, offsetof(struct live_head, crc));
    return pwrite(fd, &head, sizeof head, 0) == sizeof head ? 0 : -1;
}

/* Under another name until it is whole: a kill in between leaves no live file that could be taken for one. */
static int make_live(struct pv_map *map, struct pv_fail *fail)
{
    char path[4200];
    int fd;

    snprintf(path, sizeof path, "%s.new", map->live_path);
    fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fd < 0)
        return pv_fail(fail, errno, "%.150s: %s", path, strerror(errno));
    if (map_live(map, fd, fail)) {
        close(fd);
        unlink(path);
        return -1;
    }
    if (load_pages(map, true, fail)) {
        unlink(path);
        return -1;
    }
    if (write_live_head(map, fd) || rename(path, map->live_path)) {
        pv_fail(fail, errno, "%.150s: %s", map->live_path, strerror(errno));
        unlink(path);
        return -1;
    }
    return 0;
}

static int open_live(struct pv_map *map, struct pv_fail *fail)
{
    int fd = open(map->live_path, O_RDWR | O_CLOEXEC);

    if (fd >= 0 && live_is_good(map, fd)) {
        if (!reuse_live(map, fd, fail))
            return 0;
        if (map->live_fd < 0)
            close(fd);
        return -1;
    }
    if (fd >= 0)
        close(fd);
    map->lost_power = map->head.in_use;
    return make_live(map, fail);
}

/* ---- open and close ---- */

static int open_target(struct pv_map *map, struct pv_fail *fail)
{
    int fd = fcntl(map->fd, F_DUPFD_CLOEXEC, 0);
    struct pv_data *data;

    if (fd < 0)
        return pv_fail(fail, errno, "state of %s: %s", map->head.kind, strerror(errno));
    data = pv_data_file(fd, 0, fail);
    if (!data)
        return -1;
    map->state_data = data;
    map->state = pv_target_data(data, fail);
    if (!map->state)
        data->class->close(data);
    return map->state ? 0 : -1;
}

static int mark_in_use(struct pv_map *map, bool in_use, struct pv_fail *fail)
{
    map->head.in_use = in_use;
    if (!write_head(map->fd, &map->head, map->head_generation + 1) && !fdatasync(map->fd)) {
        map->head_generation++;
        return 0;
    }
    return pv_fail(fail, errno, "state of %s: %s", map->head.kind, strerror(errno));
}

static int open_all(struct pv_map *map, const char *path, const char *kind, struct pv_fail *fail)
{
    if (open_state(map, path, kind, fail))
        return -1;
    map->count = pages_of(map->head.bytes);
    map->pages = calloc(map->count + 1, sizeof *map->pages);
    if (!map->pages || asprintf(&map->live_path, "%s.live", path) < 0)
        return pv_fail(fail, ENOMEM, "no memory for the map of %s", kind);
    if (ftruncate(map->fd, (off_t)state_size(map->count)) || open_live(map, fail))
        return fail->error ? -1 : pv_fail(fail, errno, "state %.150s: %s", path, strerror(errno));
    if (map->watch && !map->head.in_use && mark_in_use(map, true, fail))
        return -1;
    return open_target(map, fail);
}

static void release(struct pv_map *map)
{
    pv_target_free(map->state);
    if (map->live)
        munmap(map->live, map->live_size ? map->live_size : 1);
    if (map->live_fd >= 0)
        close(map->live_fd);
    if (map->fd >= 0)
        close(map->fd);
    free(map->pages);
    free(map->live_path);
    free(map);
}

struct pv_map *pv_map_open(struct pv_filter *filter, const char *path, const char *kind, bool watch, struct pv_fail *fail)
{
    struct pv_map *map = calloc(1, sizeof *map);

    fail->error = 0;
    if (!map) {
        pv_fail(fail, ENOMEM, "no memory for the map of %s", kind);
        return NULL;
    }
    map->filter = filter;
    map->watch = watch;
    map->fd = map->live_fd = -1;
    pv_map_sync_init(map);
    if (open_all(map, path, kind, fail)) {
        release(map);
        return NULL;
    }
    return map;
}

void pv_map_close(struct pv_map *map)
{
    struct pv_fail fail;

    if (!map)
        return;
    if (!map->changed && (!map->watch || !mark_in_use(map, false, &fail)))
        unlink(map->live_path);
    release(map);
}

void pv_map_attached(struct pv_map *map)
{
    pv_target_attach(map->state, map->filter->instance->loop);
}

void pv_map_detach(struct pv_map *map)
{
    pv_loop_undefer(map->filter->instance->loop, &map->again);
    pv_target_detach(map->state);
}

/* ---- marks ---- */

uint16_t pv_map_seconds(void)
{
    return (uint16_t)(pv_loop_clock_ns() / 1000000000);
}

void pv_map_use_marks(struct pv_map *map, bool (*busy)(struct pv_filter *filter, uint64_t page))
{
    map->busy = busy;
}

bool pv_map_marked(const struct pv_map *map, uint64_t first, uint64_t last)
{
    for (uint64_t page = first; page <= last; page++)
        if ((map->pages[page].flags & (PV_PAGE_MARK | PV_PAGE_MARKED)) != (PV_PAGE_MARK | PV_PAGE_MARKED))
            return false;
    return true;
}

bool pv_map_in_doubt(const struct pv_map *map, uint64_t page)
{
    return map->pages[page].flags & PV_PAGE_DOUBT;
}

/* ---- pages ---- */

uint64_t pv_map_word(const struct pv_map *map, unsigned index)
{
    return map->head.words[index];
}

uint64_t pv_map_bytes(const struct pv_map *map)
{
    return map->count * PV_MAP_PAGE;
}

bool pv_map_lost_power(const struct pv_map *map)
{
    return map->lost_power;
}

bool pv_map_changed(const struct pv_map *map)
{
    return map->changed || map->round_runs;
}

const uint8_t *pv_map_look(const struct pv_map *map, uint64_t page)
{
    return map->pages[page].flags & PV_PAGE_BACKED ? map->live + page * PV_MAP_PAGE : NULL;
}

int pv_map_back(struct pv_map *map, uint64_t page)
{
    if (map->pages[page].flags & PV_PAGE_BACKED)
        return 0;
    if (fallocate(map->live_fd, 0, (off_t)(LIVE_HEAD + page * PV_MAP_PAGE), PV_MAP_PAGE))
        return errno;
    map->pages[page].flags |= PV_PAGE_BACKED;
    return 0;
}

void pv_map_note(struct pv_map *map, uint64_t page)
{
    if (map->busy)
        map->pages[page].changed_s = pv_map_seconds();
    if (!(map->pages[page].flags & PV_PAGE_CHANGED))
        map->changed++;
    map->pages[page].flags |= PV_PAGE_CHANGED;
}

uint8_t *pv_map_change(struct pv_map *map, uint64_t page)
{
    pv_map_note(map, page);
    return map->live + page * PV_MAP_PAGE;
}

static int grow_live(struct pv_map *map, uint64_t count, struct pv_fail *fail)
{
    size_t size = count * PV_MAP_PAGE;
    void *live;

    if (ftruncate(map->live_fd, (off_t)(LIVE_HEAD + size)))
        return pv_fail(fail, errno, "%.150s: %s", map->live_path, strerror(errno));
    live = mremap(map->live, map->live_size ? map->live_size : 1, size, MREMAP_MAYMOVE);
    if (live == MAP_FAILED)
        return pv_fail(fail, errno, "%.150s: %s", map->live_path, strerror(errno));
    map->live = live;
    map->live_size = size;
    return 0;
}

int pv_map_grow(struct pv_map *map, uint64_t bytes, struct pv_fail *fail)
{
    uint64_t count = pages_of(bytes);
    struct pv_map_page *pages;

    if (count <= map->count)
        return 0;
    pages = realloc(map->pages, (count + 1) * sizeof *pages);
    if (!pages)
        return pv_fail(fail, ENOMEM, "no memory for the map of %s", map->head.kind);
    memset(pages + map->count, 0, (count + 1 - map->count) * sizeof *pages);
    map->pages = pages;
    if (grow_live(map, count, fail))
        return -1;
    if (map->state_data->class->resize(map->state_data, state_size(count), fail))
        return -1;
    map->state_data->size = state_size(count);
    map->count = count;
    map->head.bytes = bytes;
    return mark_in_use(map, map->head.in_use, fail);
}
