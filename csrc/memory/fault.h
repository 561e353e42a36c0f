/* The page-fault server of one VM: fills guest RAM from templates as it is touched.
 *
 * Theory of operation
 * -------------------
 * Guest RAM is a memfd that several processes map (QEMU, and the VM's device process with its vhost-user back ends). It
 * starts empty. Each mapping is registered with a userfaultfd of the process that made it; a first touch suspends the
 * toucher and becomes a message here:
 *
 *      message (address in that mapping) -> RAM offset -> page walk (space.h) -> VAD -> UFFDIO_COPY | UFFDIO_ZEROPAGE -> toucher goes on
 *
 * The copy goes into the memfd's page cache, so a page filled through one mapping is there for all; a second toucher that
 * had faulted meanwhile finds it by EEXIST and is only woken.
 *
 * State of each page of RAM, kept here (one atomic byte; only the server and the prefetcher write it):
 *
 *      ABSENT --fault or prefetch--> PRESENT --REMOVE event (balloon)--> REMOVED --fault--> PRESENT (zeroes)
 *
 * A page that was removed holds zeroes from then on, whatever the template has.
 *
 * Fault-around: a fault also fills its neighbours inside an aligned window, as far as they are ABSENT and consecutive in the
 * same VAD: one wake-up costs more than copying 64 KiB.
 *
 * What cannot be served (a source that is short or fails, an address that nothing maps) is never answered with wrong data:
 * the server stops, names the reason (pv_fault_reason), and leaves the toucher suspended for its owner to kill.
 *
 * A successor of a server that died must wake the whole range first (pv_fault_wake_all): what the dead one had read and not
 * served is never delivered again, but a woken toucher faults anew.
 *
 * The serving thread never touches guest RAM itself: it would wait for itself.
 *
 * Source: US 11341058; userfaultfd(2), ioctl_userfaultfd(2).
 */
#ifndef PV_FAULT_H
#define PV_FAULT_H

#include "source.h"
#include "space.h"

#define PV_FAULT_SOURCES 16
#define PV_FAULT_RANGES 16
#define PV_FAULT_UFFDS 4
#define PV_FAULT_BUCKETS 36 /* of the latency histogram: bucket i counts faults served in less than 2^i nanoseconds */

struct pv_fault;

struct pv_fault_config {
    const struct pv_pfdb *db;
    struct pv_space *space;  /* address = offset in guest RAM */
    uint64_t ram_bytes;      /* a multiple of the page size */
    uint32_t around_pages;   /* fault-around window, a power of two; 1: none */
    uint32_t record_pages;   /* how many first touches are remembered for later prefetching; 0: none */
};

struct pv_fault_stats {
    uint64_t faults, pages_copied, pages_zeroed, already_there, removed_pages;
    uint64_t prefetched;                /* pages filled by pv_fault_prefetch; they are among the copied ones */
    uint64_t prefetch_hits;             /* faults on pages that had been prefetched by the time they were read */
    uint64_t bytes;                     /* filled in all */
    uint64_t units_loaded, units_found; /* of dear sources, by this server itself: see source.h */
    uint64_t frames_found, frames_asked; /* pages filled from frames that the host had loaded; asks to load one: see frames.h */
    uint64_t latency[PV_FAULT_BUCKETS]; /* from reading the message to waking the toucher */
    uint64_t latency_ns;                /* their sum */
};

/* 0, or -1 with *err = EINVAL, ENOMEM, EAGAIN (no reader slot left in the space) or what eventfd and epoll say. */
int pv_fault_create(const struct pv_fault_config *config, struct pv_fault **out, int *err);

/* Stops nothing: pv_fault_run must have returned. Closes the userfaultfds, which wakes every suspended toucher (who then sees
 * zeroes): destroy only when the VM is gone. NULL is allowed. */
void pv_fault_destroy(struct pv_fault *server);

/* VADs with this source number read from `fd`, which stays the caller's; see pv_source_open for `kind` and `bytes`. Before run.
 * 0, or -1 with *err = EINVAL (number, kind), EEXIST, or what pv_source_open says, then with a reason too. */
int pv_fault_add_source(struct pv_fault *server, uint32_t source, enum pv_source_kind kind, int fd, uint64_t bytes,
                        int *err);

/* Source `source`, added before, is loaded once for the host: its frames are looked for in `store`, and `loader` is asked for those that
 * are not there; the source itself is read only where the loader cannot or is lost (loader.h, frames.h). Both descriptors stay
 * the caller's. Before run. 0, or -1 with *err = EINVAL (no such source, not a dear one, no store), EEXIST, ENOMEM or what mmap says. */
int pv_fault_share_source(struct pv_fault *server, uint32_t source, int store, int loader, int *err);

/* [start, start + length) in the address space that `uffd` belongs to maps RAM from `offset`. The descriptor is taken over
 * on success (once: naming it again adds a range to it); it must have been registered for missing pages. Before run, or while
 * it runs (any thread). 0, or -1 with *err = EINVAL (beyond RAM, misaligned, wraps), ENOSPC. */
int pv_fault_add_range(struct pv_fault *server, int uffd, uint64_t start, uint64_t length, uint64_t offset, int *err);

/* Makes the userfaultfd of *this* process, for the back ends that map RAM here. `device` is an open /dev/userfaultfd, or -1 for the
 * system call. Once, before pv_fault_register_own. 0, or -1 with *err (EPERM: see vm.unprivileged_userfaultfd). */
int pv_fault_open_own(struct pv_fault *server, int device, int *err);

/* A mapping of RAM in this process is new (before its first touch), or about to be unmapped. Any thread but the serving one.
 * 0, or -1 with *err = EINVAL, ENOSPC, ENXIO (no pv_fault_open_own), or what the registration says. */
int pv_fault_register_own(struct pv_fault *server, void *start, uint64_t length, uint64_t offset, int *err);
void pv_fault_forget_own(struct pv_fault *server, const void *start);

/* Both, as a hook for whoever maps RAM: `server` as the context, `mapped` 1 or 0. 0, or a positive errno. */
int pv_fault_map_hook(void *server, int mapped, void *start, uint64_t length, uint64_t offset);

/* Another fault-around window from the next fault on; any thread. 0, or -1 with *err = EINVAL: no power of two up to 512. */
int pv_fault_set_around(struct pv_fault *server, uint32_t around_pages, int *err);

/* Where the trace points of this module go: a struct pv_trace_hook that stays (percpu/trace_point.h), or NULL. Any thread. */
void pv_fault_trace(const void *hook);

/* Serves until pv_fault_stop (0) or until something cannot be served (-1, *err = EIO and a reason). In a thread of its own. */
int pv_fault_run(struct pv_fault *server, int *err);

/* From any thread; async-signal-safe. */
void pv_fault_stop(struct pv_fault *server);

/* Why run gave up; empty before. Valid until destroy. */
const char *pv_fault_reason(const struct pv_fault *server);

/* Fills pages, given by number in RAM, in that order, until all are there or the server stops; from any thread beside run.
 * Neighbours that are consecutive in the list are copied together. Returns pages filled. */
uint64_t pv_fault_prefetch(struct pv_fault *server, const uint32_t *pages, uint64_t count);

/* Copies up to `room` page numbers in the order of their first touch. Returns how many were recorded in all. */
uint64_t pv_fault_recorded(struct pv_fault *server, uint32_t *pages, uint64_t room);

/* Marks pages as present that a predecessor had filled, and wakes every toucher of every range. */
void pv_fault_wake_all(struct pv_fault *server);

void pv_fault_stats(struct pv_fault *server, struct pv_fault_stats *out);

#endif
