/* What map.c and map_sync.c share. */
#ifndef PV_MAP_ROOMS_H
#define PV_MAP_ROOMS_H

#include "map.h"

#define PV_SLOT 4096u
#define PV_SLOT_MAGIC 0x5056534cu /* "PVSL" */
#define PV_MAP_VERSION 1u
#define PV_MAP_BYTES_MAX (1ull << 40)
#define PV_MAP_WRITES 16 /* slots that are written at once */

/* A page as it stands in the state file, twice. Index 0 is the head's, page p's is p + 1. */
struct pv_slot {
    uint32_t magic, crc; /* crc: of all that follows it */
    uint64_t index;
    uint32_t generation, marked;
    uint8_t pad[40];
    uint8_t payload[PV_MAP_PAGE];
    uint8_t rest[PV_SLOT - 64 - PV_MAP_PAGE];
};

_Static_assert(sizeof(struct pv_slot) == PV_SLOT, "a slot is a block");

/* The payload of the head's slot. */
struct pv_map_head {
    char kind[16];
    uint32_t version, in_use;
    uint64_t bytes, words[PV_MAP_WORDS];
    uint8_t id[16]; /* ties the live file to the state file */
};

enum {
    PV_PAGE_BACKED = 1,  /* the live file has room for it */
    PV_PAGE_CHANGED = 2, /* the live copy is newer than the durable one */
    PV_PAGE_WRITTEN = 4, /* the state file has it */
    PV_PAGE_SECOND = 8,  /* the newer of its slots is the second */
    PV_PAGE_MARK = 16,   /* is to be marked */
    PV_PAGE_MARKED = 32, /* is marked, durably */
    PV_PAGE_DOUBT = 64,  /* was marked when power was lost */
};

struct pv_map_page {
    uint32_t generation;
    uint16_t changed_s; /* when, in seconds of the loop's clock, modulo 2^16 */
    uint8_t flags;
};

struct pv_map {
    struct pv_filter *filter;
    int fd, live_fd;
    char *live_path;
    bool watch, lost_power;
    struct pv_map_head head;
    uint32_t head_generation;
    uint8_t *live;
    size_t live_size;
    uint64_t count; /* pages */
    struct pv_map_page *pages;
    bool (*busy)(struct pv_filter *filter, uint64_t page); /* NULL: no marks */
    uint64_t changed; /* pages with PV_PAGE_CHANGED */
    struct pv_data *state_data; /* the target's */
    struct pv_target *state;

    /* The round of map_sync.c. */
    bool round_runs;
    int round_error;
    struct pv_target *data;
    struct pv_link waiting, round; /* struct pv_io */
    struct pv_link copies;         /* struct copy: not written yet */
    struct pv_link written;        /* struct copy: written, not yet flushed */
    unsigned writing;
    bool pumping;
    struct pv_task again;
};

void pv_map_seal(struct pv_slot *slot, uint64_t index, uint32_t generation);
void pv_map_note(struct pv_map *map, uint64_t page); /* it was changed */
uint16_t pv_map_seconds(void);
void pv_map_sync_init(struct pv_map *map);

#endif
