/* Connecting to a server and the handshake: blocking, in a thread of its own (or the one that opens the disk). */
#include <endian.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "client_rooms.h"
#include "common/cleanup.h"

static int wait_for(int fd, short events)
{
    struct pollfd p = {.fd = fd, .events = events};

    return poll(&p, 1, 5000) == 1 ? 0 : -1;
}

static int read_all(int fd, void *to, size_t length)
{
    while (length) {
        ssize_t got = wait_for(fd, POLLIN) ? -1 : recv(fd, to, length, MSG_DONTWAIT);

        if (got <= 0)
            return -1;
        to = (uint8_t *)to + got;
        length -= (size_t)got;
    }
    return 0;
}

static int write_all(int fd, const void *from, size_t length)
{
    while (length) {
        ssize_t sent = wait_for(fd, POLLOUT) ? -1 : send(fd, from, length, MSG_NOSIGNAL | MSG_DONTWAIT);

        if (sent <= 0)
            return -1;
        from = (const uint8_t *)from + sent;
        length -= (size_t)sent;
    }
    return 0;
}

static int take_info(const uint8_t *body, uint32_t length, struct pv_nbd_export *out)
{
    uint16_t type, flags;
    uint64_t size;
    uint32_t least;

    if (length < 2)
        return -1;
    memcpy(&type, body, 2);
    type = be16toh(type);
    if (type == NBD_INFO_EXPORT && length >= 12) {
        memcpy(&size, body + 2, 8);
        memcpy(&flags, body + 10, 2);
        out->size = be64toh(size);
        out->flags = be16toh(flags);
    } else if (type == NBD_INFO_BLOCK_SIZE && length >= 14) {
        memcpy(&least, body + 2, 4);
        out->block_size = be32toh(least);
    }
    return 0;
}

/* NBD_OPT_GO and its answers, up to the ACK. */
static int go(int fd, const char *name, struct pv_nbd_export *out, const char **why)
{
    uint32_t name_length = (uint32_t)strlen(name), wire_length = htobe32(name_length);
    struct nbd_option option = {htobe64(NBD_OPTION_MAGIC), htobe32(NBD_OPT_GO), htobe32(name_length + 8)};
    uint16_t infos[2] = {htobe16(1), htobe16(NBD_INFO_BLOCK_SIZE)};
    struct nbd_option_reply reply;
    uint8_t body[1024];

    *why = "it does not answer as an NBD server does";
    if (write_all(fd, &option, sizeof(option)) || write_all(fd, &wire_length, 4) || write_all(fd, name, name_length) ||
        write_all(fd, infos, sizeof(infos)))
        return -1;
    for (;;) {
        uint32_t type, length;

        if (read_all(fd, &reply, sizeof(reply)) || be64toh(reply.magic) != NBD_OPTION_REPLY_MAGIC)
            return -1;
        type = be32toh(reply.type);
        length = be32toh(reply.length);
        if (length > sizeof(body) || read_all(fd, body, length))
            return -1;
        if (type == NBD_REP_ACK)
            return 0;
        if (type != NBD_REP_INFO) {
            *why = type == NBD_REP_ERR_UNKNOWN ? "it has no export of that name" : "it refuses the export";
            return -1;
        }
        if (take_info(body, length, out))
            return -1;
    }
}

static int shake(int fd, const char *name, struct pv_nbd_export *out, const char **why)
{
    struct {
        uint64_t magic, option_magic;
        uint16_t flags;
    } __attribute__((packed)) greeting;
    uint32_t flags = htobe32(NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES);

    *why = "it does not greet as an NBD server does";
    if (read_all(fd, &greeting, sizeof(greeting)) || be64toh(greeting.magic) != NBD_MAGIC ||
        be64toh(greeting.option_magic) != NBD_OPTION_MAGIC || !(be16toh(greeting.flags) & NBD_FLAG_FIXED_NEWSTYLE))
        return -1;
    if (!(be16toh(greeting.flags) & NBD_FLAG_NO_ZEROES))
        flags = htobe32(NBD_FLAG_FIXED_NEWSTYLE);
    if (write_all(fd, &flags, sizeof(flags)))
        return -1;
    *out = (struct pv_nbd_export){.block_size = 1};
    return go(fd, name, out, why);
}

int pv_nbd_connect(const struct sockaddr_un *address, const char *name, struct pv_nbd_export *out, const char **why)
{
    cleanup_fd int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    *why = "cannot connect";
    if (fd < 0 || connect(fd, (const struct sockaddr *)address, sizeof(*address)) || shake(fd, name, out, why))
        return -1;
    return steal_fd(&fd);
}
