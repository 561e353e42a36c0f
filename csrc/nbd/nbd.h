/* NBD both ways: an instance (or what lies below one of its filters) as an export on a Unix socket, and an NBD server's
 * export as a disk's data or as the target of a redirect. */
#ifndef PV_NBD_H
#define PV_NBD_H

#include "iofilter/instance.h"

struct pv_nbd_server;

struct pv_nbd_counts {
    uint64_t connections, requests, refused; /* refused: protocol broken, connection closed */
};

/* Serves on a listening Unix socket, which becomes the server's own, under one name (clients that ask for "" get it
 * too). `below`: a filter of the instance: requests enter right below it; NULL: at the top. On the loop's thread.
 * NULL: *fail, and the socket is closed. */
struct pv_nbd_server *pv_nbd_serve(struct pv_instance *instance, struct pv_filter *below, const char *name,
    int listener, bool read_only, struct pv_fail *fail);
/* Stops: no new connections, those there are closed once nothing of theirs is in flight; then `closed` is called,
 * perhaps before this returns, and the server is gone. On the loop's thread. */
void pv_nbd_stop(struct pv_nbd_server *server, void (*closed)(void *context), void *context);
struct pv_nbd_counts pv_nbd_counts(const struct pv_nbd_server *server); /* any thread */

/* An export of a server on a Unix socket as data. Connects and asks for the export at once (may block for
 * `patience_ms`). When the connection is lost, requests wait while it is made again for patience_ms, then fail with
 * EIO until it is back; requests that were under way are sent again, as none of them was acknowledged. */
struct pv_data *pv_data_nbd(const char *path, const char *export, uint32_t patience_ms, struct pv_fail *fail);

#endif
