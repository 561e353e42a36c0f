/* The server's handshake: fixed newstyle. */
#include <endian.h>
#include <string.h>
#include <sys/socket.h>

#include "server_rooms.h"

static void say(struct pv_nbd_conn *c, const void *data, size_t length)
{
    /* A few hundred bytes to a socket that is empty: one that cannot take them has a client that does not play by the
     * rules. */
    if (c->state != CLOSING && send(c->fd, data, length, MSG_NOSIGNAL | MSG_DONTWAIT) != (ssize_t)length)
        pv_nbd_broken(c);
}

static void answer(struct pv_nbd_conn *c, uint32_t type, const void *data, uint32_t length)
{
    struct {
        struct nbd_option_reply head;
        uint8_t data[512];
    } __attribute__((packed)) reply = {
        .head = {htobe64(NBD_OPTION_REPLY_MAGIC), c->option.option, htobe32(type), htobe32(length)}};

    if (length)
        memcpy(reply.data, data, length);
    say(c, &reply, sizeof(reply.head) + length);
}

static uint16_t export_flags(const struct pv_nbd_server *server)
{
    unsigned flags = NBD_HAS_FLAGS | NBD_SEND_FLUSH | NBD_SEND_FUA | NBD_CAN_MULTI_CONN;

    if (server->read_only)
        flags |= NBD_READ_ONLY;
    else
        flags |= NBD_SEND_TRIM | NBD_SEND_WRITE_ZEROES;
    return (uint16_t)flags;
}

static uint64_t export_size(const struct pv_nbd_server *server)
{
    return server->below ? server->below->below : server->instance->size;
}

static bool is_our_name(const struct pv_nbd_server *server, const uint8_t *name, size_t length)
{
    return !length || (length == strlen(server->name) && !memcmp(name, server->name, length));
}

static void answer_info(struct pv_nbd_conn *c, const uint8_t *body, uint32_t length, bool go)
{
    struct {
        uint16_t type;
        uint64_t size;
        uint16_t flags;
    } __attribute__((packed)) export = {htobe16(NBD_INFO_EXPORT), htobe64(export_size(c->server)),
        htobe16(export_flags(c->server))};
    struct {
        uint16_t type;
        uint32_t least, preferred, most;
    } __attribute__((packed)) block = {htobe16(NBD_INFO_BLOCK_SIZE), htobe32(c->server->instance->block_size),
        htobe32(4096), htobe32(NBD_PAYLOAD_MAX)};
    uint32_t name_length;

    if (length < 6) {
        answer(c, NBD_REP_ERR_INVALID, NULL, 0);
        return;
    }
    memcpy(&name_length, body, sizeof(name_length));
    name_length = be32toh(name_length);
    if (name_length > length - 6) {
        answer(c, NBD_REP_ERR_INVALID, NULL, 0);
        return;
    }
    if (!is_our_name(c->server, body + 4, name_length)) {
        answer(c, NBD_REP_ERR_UNKNOWN, NULL, 0);
        return;
    }
    answer(c, NBD_REP_INFO, &export, sizeof(export));
    answer(c, NBD_REP_INFO, &block, sizeof(block));
    answer(c, NBD_REP_ACK, NULL, 0);
    if (go && c->state != CLOSING)
        c->state = TRANSMISSION;
}

static void answer_export_name(struct pv_nbd_conn *c, const uint8_t *body, uint32_t length)
{
    struct {
        uint64_t size;
        uint16_t flags;
        uint8_t zeroes[124];
    } __attribute__((packed)) reply = {
        .size = htobe64(export_size(c->server)), .flags = htobe16(export_flags(c->server))};

    if (!is_our_name(c->server, body, length)) { /* this option has no way to say no */
        pv_nbd_broken(c);
        return;
    }
    say(c, &reply, c->no_zeroes ? 10 : sizeof(reply));
    if (c->state != CLOSING)
        c->state = TRANSMISSION;
}

static void answer_list(struct pv_nbd_conn *c)
{
    uint8_t entry_bytes[4 + sizeof(c->server->name)];
    uint32_t length = (uint32_t)strlen(c->server->name), wire = htobe32(length);

    memcpy(entry_bytes, &wire, 4);
    memcpy(entry_bytes + 4, c->server->name, length);
    answer(c, NBD_REP_SERVER, entry_bytes, 4 + length);
    answer(c, NBD_REP_ACK, NULL, 0);
}

static void on_option(struct pv_nbd_conn *c, const uint8_t *body, uint32_t length)
{
    c->state = OPTION;
    switch (be32toh(c->option.option)) {
    case NBD_OPT_EXPORT_NAME:
        answer_export_name(c, body, length);
        break;
    case NBD_OPT_GO:
    case NBD_OPT_INFO:
        answer_info(c, body, length, be32toh(c->option.option) == NBD_OPT_GO);
        break;
    case NBD_OPT_LIST:
        answer_list(c);
        break;
    case NBD_OPT_ABORT:
        answer(c, NBD_REP_ACK, NULL, 0);
        pv_nbd_close(c);
        break;
    default:
        answer(c, NBD_REP_ERR_UNSUP, NULL, 0);
    }
}

/* One step of the handshake. False: more bytes are needed. */
bool pv_nbd_shake(struct pv_nbd_conn *c)
{
    size_t have = c->rx_end - c->rx_start;
    const uint8_t *at = c->rx + c->rx_start;
    uint32_t length = be32toh(c->option.length), flags;

    if (c->state == FLAGS) {
        if (have < 4)
            return false;
        memcpy(&flags, at, 4);
        flags = be32toh(flags);
        c->rx_start += 4;
        c->state = OPTION;
        c->no_zeroes = flags & NBD_FLAG_NO_ZEROES;
        if (flags & ~(uint32_t)(NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES) || !(flags & NBD_FLAG_FIXED_NEWSTYLE))
            pv_nbd_broken(c);
    } else if (c->state == OPTION) {
        if (have < sizeof(c->option))
            return false;
        memcpy(&c->option, at, sizeof(c->option));
        c->rx_start += sizeof(c->option);
        c->state = BODY;
        if (be64toh(c->option.magic) != NBD_OPTION_MAGIC || be32toh(c->option.length) > NBD_OPTION_MAX)
            pv_nbd_broken(c);
    } else {
        if (have < length)
            return false;
        c->rx_start += length;
        on_option(c, at, length);
    }
    return true;
}

void pv_nbd_greet(struct pv_nbd_conn *c)
{
    struct {
        uint64_t magic, option_magic;
        uint16_t flags;
    } __attribute__((packed)) greeting = {htobe64(NBD_MAGIC), htobe64(NBD_OPTION_MAGIC),
        htobe16(NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES)};

    say(c, &greeting, sizeof(greeting));
}
