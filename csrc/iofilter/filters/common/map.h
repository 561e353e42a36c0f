/* A filter's persistent map of its disk (which clusters are the clone's own, which regions are dirty, checksums): what has to survive a
 * killed process and a power cut, and must cost nothing on the way of a request.
 *
 * Theory of operation
 * -------------------
 * A map is an array of pages of 2 KiB, all zero at first, in two copies:
 *
 *   live      <state>.live, mapped into memory: what the filter reads and writes. A store is in the kernel's page cache at once, so a
 *             process that is killed at any instant leaves it exactly as it was, together with the data that it wrote (which is in the
 *             page cache as well). It is trusted only within the boot that wrote it (the kernel's boot id is in its head): after a power
 *             cut the kernel may have written map and data back in any order.
 *   durable   <state>: each page has two slots of 4 KiB with a generation and a CRC-32C, written in turn, so that a torn write leaves
 *             the other. Written by pv_map_sync alone, in this order:
 *
 *                 copy the pages that changed -> flush the data -> write the copies -> flush the state file
 *
 *             so a durable map never speaks of data that is not durable itself. After a power cut the live copy is made anew from it.
 *
 *     open (same boot: live; other boot: durable) -> look, back, change ... sync ... -> close (nothing changed since the last sync: live is removed)
 *
 * Marks, for maps that must not be older than the data (integrity): a page that is to be changed is marked durably before the data is
 * written, in groups of PV_MAP_MARK_GROUP; the mark goes away with a sync, once the page was left alone for PV_MAP_MARK_SECONDS. After a power cut
 * a marked page is *in doubt*: its data may be newer than it (the dirty regions of Linux's md and dm-integrity).
 *
 * What was acknowledged and not flushed survives a kill and not a power cut, as with any disk; what was flushed survives both.
 *
 * Memory: 8 bytes a page, and the pages of the live file that were ever changed. Pages that were not are holes and take nothing.
 * Disk full: pv_map_back reserves a page before the first store into it, so that no store into the mapping meets a full disk.
 *
 * Threads: open and close may block and are for any thread; the rest is for the loop. One opener at a time, by a lock on the state file.
 */
#ifndef PV_MAP_H
#define PV_MAP_H

#include "../all.h"

#define PV_MAP_PAGE 2048u /* bytes */
#define PV_MAP_WORDS 8
#define PV_MAP_MARK_GROUP 16u
#define PV_MAP_MARK_SECONDS 5u

struct pv_map;

/* Makes the state file of a map of `bytes` bytes. It must not exist. `words`: the filter's own, given back by pv_map_word. */
enum {
    PV_MAP_LOST = 1,     /* the first opener finds pv_map_lost_power */
    PV_MAP_UNSYNCED = 2, /* not durable yet: the first pv_map_sync makes it so. For those that are made by the thousand */
};
int pv_map_create(const char *path, const char *kind, uint64_t bytes, const uint64_t words[PV_MAP_WORDS], unsigned how,
    struct pv_fail *fail);
/* `watch`: the state file remembers durably that it is in use, so that pv_map_lost_power can tell. */
struct pv_map *pv_map_open(struct pv_filter *filter, const char *path, const char *kind, bool watch, struct pv_fail *fail);
void pv_map_close(struct pv_map *map);
void pv_map_attached(struct pv_map *map);
void pv_map_detach(struct pv_map *map);

uint64_t pv_map_word(const struct pv_map *map, unsigned index);
uint64_t pv_map_bytes(const struct pv_map *map);
/* It was in use when the machine went down: what was not synced is missing. */
bool pv_map_lost_power(const struct pv_map *map);
/* More bytes than it has; while the instance is quiet or before it is attached. */
int pv_map_grow(struct pv_map *map, uint64_t bytes, struct pv_fail *fail);

/* A page's bytes; NULL: all zero. Until the next pv_map_grow. */
const uint8_t *pv_map_look(const struct pv_map *map, uint64_t page);
/* Reserves room for a page: 0 or a positive errno. */
int pv_map_back(struct pv_map *map, uint64_t page);
/* A page that is backed, to be stored into; it counts as changed. */
uint8_t *pv_map_change(struct pv_map *map, uint64_t page);
bool pv_map_changed(const struct pv_map *map); /* since the last sync, or one is under way */

/* Makes all that was changed until now durable, data first: by a flush of `data` (NULL: of what lies downstream). Then `settled` has the
 * request back, on the loop. Several that wait share one round. The request's `link` is the map's in between. */
void pv_map_sync(struct pv_map *map, struct pv_target *data, struct pv_io *io, void (*settled)(struct pv_io *io, int error));

/* Marks. `busy`: whether the page's data is being written at this moment. */
void pv_map_use_marks(struct pv_map *map, bool (*busy)(struct pv_filter *filter, uint64_t page));
bool pv_map_marked(const struct pv_map *map, uint64_t first, uint64_t last);
/* Marks pages first to last durably; then `marked` has the request back. */
void pv_map_mark(struct pv_map *map, uint64_t first, uint64_t last, struct pv_io *io, void (*marked)(struct pv_io *io, int error));
bool pv_map_in_doubt(const struct pv_map *map, uint64_t page);

extern const char *pv_boot_id_for_tests; /* in place of the kernel's */
extern unsigned pv_map_patience_ms;      /* how long an opener waits for another to let go; tests make it short */

#endif
