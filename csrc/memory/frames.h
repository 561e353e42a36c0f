/* A VM's side of a dear source: finds frames that were loaded already, and asks the host's loader for others. See loader.h. */
#ifndef PV_FRAMES_H
#define PV_FRAMES_H

#include "source.h"
#include "space.h"

#define PV_FRAMES_PATIENCE_MS 2000 /* a loader that takes longer is not asked again */

struct pv_frames;

/* `store` and `loader` stay the caller's. 0, or -1 with *err = EINVAL (not a store: not sealed against shrinking, or empty), ENOMEM, or
 * what the system says. */
int pv_frames_open(int store, int loader, struct pv_frames **out, int *err);
void pv_frames_close(struct pv_frames *frames); /* NULL is allowed */

/* The frame of the translated page and those of up to `pages` - 1 pages behind it, as far as they are in the store side by side.
 * 1 with *out (valid until close; no put), or 0 when the first is not there. Inside a section of the space only; any thread. */
int pv_frames_find(struct pv_frames *frames, const struct pv_pfdb *db, const struct pv_translation *page, uint64_t pages,
                   struct pv_piece *out);

/* Has it loaded: 0, or -1 when whoever asks must load for itself. Any thread but inside no section: it blocks for up to
 * PV_FRAMES_PATIENCE_MS, once; after a loader was lost it never does. */
int pv_frames_ask(struct pv_frames *frames, uint32_t vad, uint32_t page);

/* Pages found in the store; asks. */
void pv_frames_counts(const struct pv_frames *frames, uint64_t *found, uint64_t *asked);

#endif
