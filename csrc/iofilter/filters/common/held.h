/* Requests that a filter holds until a time of their own. Shared by `delay` and `throttle`; the loop's thread alone. */
#ifndef PV_HELD_H
#define PV_HELD_H

#include "../all.h"

struct pv_held {
    struct pv_filter *filter;
    struct pv_timer timer;
    struct pv_link list; /* struct pv_io, soonest first; the time is in frames[at].word */
    uint64_t count;
};

void pv_held_init(struct pv_held *held, struct pv_filter *filter);
/* Passes the request on at that time; equal times keep their order. */
void pv_held_until(struct pv_held *held, struct pv_io *io, uint64_t at_ns);
void pv_held_release(struct pv_held *held); /* all of them, now */

#endif
