/* What the kinds of sources share with source.c. */
#ifndef PV_SOURCE_KINDS_H
#define PV_SOURCE_KINDS_H

#include <pthread.h>

#include "source.h"

struct pv_slot {
    uint64_t unit, used; /* `used`: when last, by the source's clock; 0: empty */
    int holders;
    char *data;
};

struct pv_source {
    const struct pv_source_ops *ops; /* NULL: mapped */
    uint64_t bytes;
    const char *map;
    uint64_t unit_bytes;
    void *state; /* the kind's */
    pthread_mutex_t lock;
    uint64_t clock, loaded, found;
    struct pv_slot slots[PV_SOURCE_SLOTS];
};

/* Each fills `bytes` and what it needs. 0, or -1 with *err and a reason; then nothing is left behind. */
int pv_source_open_file(struct pv_source *source, int fd, int *err, char why[PV_SOURCE_WHY]);
int pv_source_open_zstd(struct pv_source *source, int fd, int *err, char why[PV_SOURCE_WHY]);
int pv_source_open_remote(struct pv_source *source, int fd, uint64_t bytes, int *err, char why[PV_SOURCE_WHY]);

/* Writes the reason; -1. */
__attribute__((format(printf, 2, 3))) int pv_source_why(char why[PV_SOURCE_WHY], const char *format, ...);

#endif
