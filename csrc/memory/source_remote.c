/* Another process as a source, over a stream socket: "offset, length" is asked, `length` bytes answer. It may be any program that
 * has the pages from wherever it likes. One that ends, or does not answer in time, is an error with a reason. */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "source_kinds.h"

#define UNIT (64u << 10)

struct remote {
    int fd;
};

static void close_remote(struct pv_source *source)
{
    struct remote *remote = source->state;

    close(remote->fd);
    free(remote);
}

static int wait_for(int fd, short events, char *why)
{
    struct pollfd polled = {fd, events, 0};
    int ready;

    do
        ready = poll(&polled, 1, PV_SOURCE_PATIENCE_MS);
    while (ready < 0 && errno == EINTR);
    return ready > 0 ? 0 : pv_source_why(why, "the other side did not answer in %d ms", PV_SOURCE_PATIENCE_MS);
}

/* All of `bytes` in either direction. */
static int transfer(int fd, int sending, char *data, uint64_t bytes, char *why)
{
    while (bytes) {
        ssize_t n = sending ? send(fd, data, bytes, MSG_NOSIGNAL | MSG_DONTWAIT) : recv(fd, data, bytes, MSG_DONTWAIT);

        if (n == 0)
            return pv_source_why(why, "the other side has ended");
        if (n < 0 && errno != EAGAIN && errno != EINTR)
            return pv_source_why(why, "the other side: %s", strerror(errno));
        if (n < 0) {
            if (wait_for(fd, sending ? POLLOUT : POLLIN, why))
                return -1;
            continue;
        }
        data += n;
        bytes -= (uint64_t)n;
    }
    return 0;
}

static int load_unit(struct pv_source *source, uint64_t unit, char *to, char why[PV_SOURCE_WHY])
{
    const struct remote *remote = source->state;
    uint64_t left = source->bytes - unit * UNIT;
    uint64_t ask[2] = {unit * UNIT, left < UNIT ? left : UNIT};

    /* After a failure the answer to an old question could still come: the server that asked has given up by then. */
    return transfer(remote->fd, 1, (char *)ask, sizeof ask, why) || transfer(remote->fd, 0, to, ask[1], why) ? -1 : 0;
}

int pv_source_open_remote(struct pv_source *source, int fd, uint64_t bytes, int *err, char why[PV_SOURCE_WHY])
{
    static const struct pv_source_ops ops = {.load = load_unit, .close = close_remote};
    struct remote *remote;

    if (!bytes || bytes % PV_PAGE_SIZE || bytes > INT64_MAX) {
        *err = EINVAL;
        return pv_source_why(why, "%llu bytes are no whole pages", (unsigned long long)bytes);
    }
    remote = calloc(1, sizeof *remote);
    if (!remote) {
        *err = ENOMEM;
        return pv_source_why(why, "no memory");
    }
    remote->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (remote->fd < 0) {
        *err = errno;
        free(remote);
        return pv_source_why(why, "%s", strerror(errno));
    }
    source->bytes = bytes;
    source->unit_bytes = UNIT;
    source->state = remote;
    source->ops = &ops;
    return 0;
}
