/* Where pages come from: the one interface of files, compressed files and other processes.
 *
 * A source is a run of bytes, a multiple of the page size long. Cheap ones (files: the kernel's page cache shares them) are mapped
 * and nothing is ever loaded. Dear ones are loaded in units (the frames of a compressed file) into a bounded cache of this
 * process, so that a unit that several faults ask for is loaded once while it stays there.
 *
 * A kind of source is a table of functions (struct pv_source_kind_ops) and an opener. Whatever a source cannot give as a whole and
 * checked is an error with a reason, never part of a page.
 *
 * Thread-safe but for open and close. pv_source_get may block as long as the source does: PV_SOURCE_PATIENCE_MS at most for
 * another process.
 */
#ifndef PV_SOURCE_H
#define PV_SOURCE_H

#include "pfdb.h"

#define PV_SOURCE_SLOTS 16          /* units in the cache of a dear source */
#define PV_SOURCE_WHY 160
#ifndef PV_SOURCE_PATIENCE_MS
#define PV_SOURCE_PATIENCE_MS 10000 /* for another process's answer; tests have less */
#endif

struct pv_source;

/* Loads unit `unit` into `to` (pv_source.unit_bytes, or less for the last). 0, or -1 with the reason in `why`. One call at a time. */
struct pv_source_ops {
    int (*load)(struct pv_source *source, uint64_t unit, char *to, char why[PV_SOURCE_WHY]);
    void (*close)(struct pv_source *source);
};

/* A piece of a source in memory, valid until put. */
struct pv_piece {
    const char *data;
    uint64_t bytes; /* a multiple of the page size, at least one page */
    int slot;       /* of the cache; -1: mapped */
};

/* Opens `fd` (duplicated or mapped: it stays the caller's) as a source of `kind`: FILE, ZSTD (zstd's seekable format: frames of one
 * size, each with a checksum, and a seek table at the end) or REMOTE (a stream socket: 16 bytes of offset and length in host order
 * ask, `length` bytes answer; `bytes` says how long the source is). `bytes` is ignored for the others.
 * 0, or -1 with *err = EINVAL (kind, empty), EBADMSG (not of the format), ENOMEM or what the system says, and a reason. */
int pv_source_open(enum pv_source_kind kind, int fd, uint64_t bytes, struct pv_source **out, int *err,
                   char why[PV_SOURCE_WHY]);

/* NULL is allowed. Nothing may be held. */
void pv_source_close(struct pv_source *source);

/* Bytes that whole pages can be read from. */
uint64_t pv_source_bytes(const struct pv_source *source);

/* The piece that begins at `offset` (page-aligned), `bytes` at most. 0, or -1 with a reason. Each success needs a put. */
int pv_source_get(struct pv_source *source, uint64_t offset, uint64_t bytes, struct pv_piece *out,
                  char why[PV_SOURCE_WHY]);
void pv_source_put(struct pv_source *source, const struct pv_piece *piece);

/* Is it loaded in units, rather than mapped? */
int pv_source_is_dear(const struct pv_source *source);

/* Units loaded, and gets that found theirs loaded. */
void pv_source_counts(struct pv_source *source, uint64_t *loaded, uint64_t *found);

#endif
