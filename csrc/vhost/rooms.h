/* What the rooms of the protocol share: vhost_user.c receives messages and keeps rings, requests.c has what each
 * message does, log.c the log of writes. See vhost_user.h for the theory of operation. */
#ifndef PV_VHOST_ROOMS_H
#define PV_VHOST_ROOMS_H

#include "vhost_user.h"

enum {
    PV_REPLIES = 1, /* has an answer of its own, so REPLY_ACK does not apply */
    PV_DRAINS = 2,  /* waits until no chain is held */
};

struct pv_handler {
    int (*handle)(struct pv_fe *fe);
    uint16_t min_size, max_size; /* of the payload */
    uint8_t max_fds;
    uint8_t flags;
    uint64_t protocol_feature; /* only for devices that have it */
};

/* NULL: a request that is not known, or is not for this device. */
const struct pv_handler *pv_fe_handler(const struct pv_fe *fe);

/* Always -1. */
int pv_fe_refuse(struct pv_fe *fe, const char *fault);
int pv_fe_reply(struct pv_fe *fe, const void *payload, uint32_t size);
int pv_fe_reply_with(struct pv_fe *fe, const void *payload, uint32_t size, int fd);
int pv_fe_reply_u64(struct pv_fe *fe, uint64_t value);
/* The first descriptor of the message, the caller's now; -1: none came. */
int pv_fe_take_fd(struct pv_fe *fe);
void pv_fe_replace_fd(int *slot, int fd);

void pv_fe_stop_ring(struct pv_fe *fe, unsigned ring);
int pv_fe_start_ring(struct pv_fe *fe, unsigned ring, int kick_fd);
/* After the memory table changed under running rings. One that is no longer mapped is stopped as broken. */
void pv_fe_remap_rings(struct pv_fe *fe);

bool pv_fe_logging(const struct pv_fe *fe);
void pv_fe_log_guest(struct pv_fe *fe, uint64_t addr, uint64_t len);
void pv_fe_drop_log(struct pv_fe *fe);

#endif
