/* What the rooms of the fault server share: its state, and the functions that go from one to the other.
 *
 * fault.c makes and ends it, fault_ranges.c knows the mappings, fault_fill.c turns a page into a copy, fault_serve.c is the loop,
 * fault_prefetch.c fills ahead. See fault.h for the theory of operation.
 */
#ifndef PV_FAULT_ROOMS_H
#define PV_FAULT_ROOMS_H

#include <pthread.h>

#include "fault.h"
#include "frames.h"

enum page_state { ABSENT, PRESENT, REMOVED, PREFETCHED };

/* A mapping of RAM; free while `length` is 0. */
struct range {
    int uffd;
    uint64_t start, length, offset;
};

struct pv_fault {
    struct pv_fault_config config;
    uint64_t pages;
    struct pv_source *sources[PV_FAULT_SOURCES];
    struct pv_frames *frames[PV_FAULT_SOURCES]; /* of dear sources that the host loads once for all; else NULL */
    struct range ranges[PV_FAULT_RANGES]; /* under `table`; a back end that maps RAM anew removes and adds */
    int uffds[PV_FAULT_UFFDS];            /* under `table`; only ever added, so whoever knows one may go on using it */
    int uffd_count, own_uffd;
    pthread_mutex_t table; /* held for a look or a change, never across a system call that may wait */
    int wake; /* eventfd: stop, or a new range */
    _Atomic(int) stopping;
    _Atomic(uint32_t) around; /* fault-around window in pages */
    _Atomic(uint8_t) *state; /* [pages] */
    uint32_t *record;
    _Atomic(uint64_t) recorded;
    struct pv_reader *serving, *prefetching;
    pthread_mutex_t prefetch_lock;
    char reason[256];
    _Atomic(uint64_t) faults, pages_copied, pages_zeroed, already_there, removed_pages, prefetch_count, prefetch_hits;
    _Atomic(uint64_t) latency[PV_FAULT_BUCKETS], latency_ns;
};

/* A run of pages of RAM that one ioctl can fill. */
struct run {
    uint64_t page, count;
    struct pv_source *source; /* NULL: zeroes */
    uint64_t offset;          /* of its first page in the source */
    uint32_t number;          /* of the source */
    struct pv_reader *reader; /* of the thread that fills it */
};

/* Writes down why the server gives up; -1. */
__attribute__((format(printf, 2, 3))) int pv_fault_give_up(struct pv_fault *server, const char *format, ...);
void pv_fault_count(_Atomic(uint64_t) *counter, uint64_t n);

/* The range of `uffd` that holds `address`; 0 when there is none. With uffd -1: the first that holds RAM offset `address`. */
int pv_fault_find_range(struct pv_fault *server, int uffd, uint64_t address, struct range *out);
void pv_fault_wake_range(const struct range *range, uint64_t address, uint64_t length);
int pv_fault_knows_uffd(const struct pv_fault *server, int uffd); /* under `table` */

/* What these promise stands with them in fault_fill.c. */
int pv_fault_is_absent(struct pv_fault *server, uint64_t page);
uint64_t pv_fault_pages_left(const struct run *run);
int pv_fault_continues(struct pv_fault *server, const struct pv_translation *base, uint64_t page, int64_t distance);
int pv_fault_locate(struct pv_fault *server, const struct pv_translation *translation, struct run *run);
int pv_fault_plan(struct pv_fault *server, struct pv_reader *reader, uint64_t page, int around, struct run *run);
void pv_fault_clip(struct run *run, const struct range *range);
int pv_fault_fill(struct pv_fault *server, const struct range *range, const struct run *run, uint8_t state,
                  uint64_t *filled);

static inline int fail(int *err, int code)
{
    *err = code;
    return -1;
}

#endif
