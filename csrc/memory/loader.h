/* The host's side of a dear source: loads what VMs ask for, once for all of them.
 *
 * Theory of operation
 * -------------------
 * Decompressing a page, or fetching it from elsewhere, is dear; a host does it once. One loader serves one source, in the process
 * that writes the page-frame database, and keeps what it loaded in a *frame store*: a memfd as long as the source, sparse, in which
 * a page lies at its place in the source. VMs map it and read.
 *
 *      VM: entry is ABSENT --ask (VAD, page)--> loader: LOADING, loads the unit into the store, PRESENT with the frame --answer--> VM
 *      VM: entry is PRESENT --> copies from the store; nobody is asked
 *
 * PRESENT is for good while the VAD lives: frames are never taken away from under a reader, so a reader needs no lock and checks
 * nothing twice. What bounds the memory is a limit on what is loaded: beyond it the answer is "full", and whoever asked loads for
 * itself, into its own small cache (source.h). A store goes as a whole, with its source.
 *
 * Who may do what. The store and the database are sealed: only the loader's mapping, made before, can write, so a VM's device
 * process that was taken over changes nothing that another reads. A store holds one source's pages, and only VMs of that
 * source are given it: one store for the whole host would let each VM read every other's snapshot. All that a client can do is
 * to ask for pages of its own source: at worst it has them loaded, up to the limit.
 *
 * Nobody depends on a loader: a client that finds it gone, or silent for PV_FRAMES_PATIENCE_MS, loads for itself from then on, and
 * frames that are there stay readable. An entry that a dead loader left LOADING means nothing to anybody but people: clients
 * wait for answers, never for states. An answer says yes or no and no more: a client that hears no tries for itself and finds
 * the reason (a damaged frame, say) with its own eyes.
 *
 * One thread a loader: a source that is slow makes nobody wait but its own VMs.
 */
#ifndef PV_LOADER_H
#define PV_LOADER_H

#include "source.h"

#define PV_LOADER_CLIENTS 1024

struct pv_loader;

struct pv_loader_config {
    struct pv_pfdb *db; /* opened for writing; must outlive the loader */
    uint32_t source;    /* its number in VADs */
    enum pv_source_kind kind;
    int fd;             /* stays the caller's; see pv_source_open for this, `kind` and `bytes` */
    uint64_t bytes;
    uint64_t max_bytes; /* how much may be loaded in all */
};

struct pv_loader_counts {
    uint64_t units, bytes;  /* loaded */
    uint64_t asked, found;  /* pages asked for; those whose unit was there already */
    uint64_t full, failed;  /* asks that were answered no: the limit, the source */
};

/* What travels: one ask, one answer, each a message of its own, in the host's order. */
struct pv_loader_ask {
    uint32_t vad, page;
};
struct pv_loader_answer {
    struct pv_loader_ask to;
    uint32_t no; /* 0: the page is in the store */
};

/* 0, or -1 with *err and a reason: what pv_source_open says; EINVAL (a kind that is not dear), EFBIG (no entry could number its
 * pages); what memfd_create and mmap say. Not thread-safe. */
int pv_loader_create(const struct pv_loader_config *config, struct pv_loader **out, int *err, char why[PV_SOURCE_WHY]);

/* pv_loader_run must have returned. Clients find it gone. The store lives on while somebody holds it. NULL is allowed. */
void pv_loader_destroy(struct pv_loader *loader);

/* A descriptor of the store that can only be read; lives as long as the loader. */
int pv_loader_store(const struct pv_loader *loader);

/* A client's end of a new connection, for the caller to pass on and close. Any thread.
 * 0, or -1 with *err = ENOSPC (PV_LOADER_CLIENTS) or what socketpair and epoll say. */
int pv_loader_add_client(struct pv_loader *loader, int *client, int *err);

/* Serves until pv_loader_stop. 0, or -1 with *err: what epoll says. In a thread of its own. While it runs, VADs of its source may be
 * added, by one thread, and not removed. */
int pv_loader_run(struct pv_loader *loader, int *err);
void pv_loader_stop(struct pv_loader *loader); /* any thread; async-signal-safe */

void pv_loader_count(const struct pv_loader *loader, struct pv_loader_counts *out);

#endif
