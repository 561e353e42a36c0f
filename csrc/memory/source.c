/* See source.h. */
#include "source.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "source_kinds.h"

int pv_source_why(char why[PV_SOURCE_WHY], const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    vsnprintf(why, PV_SOURCE_WHY, format, arguments);
    va_end(arguments);
    return -1;
}

int pv_source_open_file(struct pv_source *source, int fd, int *err, char why[PV_SOURCE_WHY])
{
    struct stat status;
    void *map;

    if (fstat(fd, &status)) {
        *err = errno;
        return pv_source_why(why, "%s", strerror(errno));
    }
    /* Whole pages only: a page that the file ends in would be half invented. */
    source->bytes = (uint64_t)status.st_size & ~(uint64_t)(PV_PAGE_SIZE - 1);
    if (!source->bytes) {
        *err = EINVAL;
        return pv_source_why(why, "the file holds no page");
    }
    map = mmap(NULL, source->bytes, PROT_READ, MAP_SHARED, fd, 0);
    if (map == MAP_FAILED) {
        *err = errno;
        return pv_source_why(why, "%s", strerror(errno));
    }
    source->map = map;
    return 0;
}

static int open_kind(struct pv_source *source, enum pv_source_kind kind, int fd, uint64_t bytes, int *err, char *why)
{
    switch (kind) {
    case PV_SOURCE_FILE:
        return pv_source_open_file(source, fd, err, why);
    case PV_SOURCE_ZSTD:
        return pv_source_open_zstd(source, fd, err, why);
    case PV_SOURCE_REMOTE:
        return pv_source_open_remote(source, fd, bytes, err, why);
    default:
        *err = EINVAL;
        return pv_source_why(why, "no kind %d", kind);
    }
}

int pv_source_open(enum pv_source_kind kind, int fd, uint64_t bytes, struct pv_source **out, int *err,
                   char why[PV_SOURCE_WHY])
{
    struct pv_source *source = calloc(1, sizeof *source);

    if (!source) {
        *err = ENOMEM;
        return pv_source_why(why, "no memory");
    }
    pthread_mutex_init(&source->lock, NULL);
    if (open_kind(source, kind, fd, bytes, err, why)) {
        pthread_mutex_destroy(&source->lock);
        free(source);
        return -1;
    }
    *out = source;
    return 0;
}

void pv_source_close(struct pv_source *source)
{
    if (!source)
        return;
    if (source->map)
        munmap((void *)source->map, source->bytes);
    for (int i = 0; i < PV_SOURCE_SLOTS; i++)
        free(source->slots[i].data);
    if (source->ops)
        source->ops->close(source);
    pthread_mutex_destroy(&source->lock);
    free(source);
}

uint64_t pv_source_bytes(const struct pv_source *source)
{
    return source->bytes;
}

int pv_source_is_dear(const struct pv_source *source)
{
    return !source->map;
}

/* The slot that holds `unit`, or the one to load it into: the least recently used that nobody holds. NULL: all are held. */
static struct pv_slot *choose_slot(struct pv_source *source, uint64_t unit)
{
    struct pv_slot *oldest = NULL;

    for (int i = 0; i < PV_SOURCE_SLOTS; i++) {
        struct pv_slot *slot = &source->slots[i];

        if (slot->used && slot->unit == unit)
            return slot;
        if (!slot->holders && (!oldest || slot->used < oldest->used))
            oldest = slot;
    }
    return oldest;
}

static int load_slot(struct pv_source *source, struct pv_slot *slot, uint64_t unit, char *why)
{
    if (!slot->data)
        slot->data = malloc(source->unit_bytes);
    if (!slot->data)
        return pv_source_why(why, "no memory for a unit of %llu bytes", (unsigned long long)source->unit_bytes);
    slot->used = 0; /* whatever becomes of the load, the old unit is gone */
    if (source->ops->load(source, unit, slot->data, why))
        return -1;
    slot->unit = unit;
    source->loaded++;
    return 0;
}

/* Under the lock, which a second thread that wants any unit waits for: two loads at once would help neither. */
static int get_loaded(struct pv_source *source, uint64_t offset, struct pv_piece *out, char *why)
{
    uint64_t unit = offset / source->unit_bytes, in_unit = offset % source->unit_bytes;
    uint64_t left = source->bytes - unit * source->unit_bytes;
    struct pv_slot *slot = choose_slot(source, unit);

    if (!slot)
        return pv_source_why(why, "all %d units of the cache are in use", PV_SOURCE_SLOTS);
    if (slot->used && slot->unit == unit)
        source->found++;
    else if (load_slot(source, slot, unit, why))
        return -1;
    slot->used = ++source->clock;
    slot->holders++;
    *out = (struct pv_piece){slot->data + in_unit, (left < source->unit_bytes ? left : source->unit_bytes) - in_unit,
                             (int)(slot - source->slots)};
    return 0;
}

int pv_source_get(struct pv_source *source, uint64_t offset, uint64_t bytes, struct pv_piece *out,
                  char why[PV_SOURCE_WHY])
{
    int result = 0;

    if (offset >= source->bytes || source->bytes - offset < PV_PAGE_SIZE)
        return pv_source_why(why, "ends at byte %llu, before the page at %llu", (unsigned long long)source->bytes,
                             (unsigned long long)offset);
    if (source->map) {
        *out = (struct pv_piece){source->map + offset, source->bytes - offset, -1};
    } else {
        pthread_mutex_lock(&source->lock);
        result = get_loaded(source, offset, out, why);
        pthread_mutex_unlock(&source->lock);
    }
    if (!result && out->bytes > bytes)
        out->bytes = bytes;
    return result;
}

void pv_source_put(struct pv_source *source, const struct pv_piece *piece)
{
    if (piece->slot < 0)
        return;
    pthread_mutex_lock(&source->lock);
    source->slots[piece->slot].holders--;
    pthread_mutex_unlock(&source->lock);
}

void pv_source_counts(struct pv_source *source, uint64_t *loaded, uint64_t *found)
{
    pthread_mutex_lock(&source->lock);
    *loaded = source->loaded;
    *found = source->found;
    pthread_mutex_unlock(&source->lock);
}
