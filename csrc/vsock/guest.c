/* The guest's side of the device: packets (virtio 1.2, section 5.10.6) taken from the TX ring and put into the RX ring.
 *
 * Theory of operation
 * -------------------
 * TX: chains are taken in order while there is room for an RST in answer. Data goes from the guest's memory straight
 * into the program's socket; only what the socket does not take at once is copied aside, never more than the
 * connection's window.
 *
 * RX: strays first, then one turn for each connection on the ready list, in a circle: a packet that it owes, or as many
 * bytes as one read brings into up to `batch` chains, straight into the guest's memory, never more than the guest gave
 * credit for. When the ring has no chain left, the guest is asked to kick and everything waits for that.
 */
#include <endian.h>
#include <errno.h>
#include <sys/socket.h>
#include <unistd.h>

#include "device.h"

#define HEADER_SIZE sizeof(struct virtio_vsock_hdr)
#define TX_A_TURN 256
#define RX_A_TURN 256
#define SHUT_BOTH (VIRTIO_VSOCK_SHUTDOWN_RCV | VIRTIO_VSOCK_SHUTDOWN_SEND)

/* A packet from the guest: the header in the host's byte order, and the chain it came in. */
struct packet {
    uint32_t guest_port, host_port;
    uint64_t src_cid, dst_cid;
    uint32_t len;
    uint16_t type, op;
    uint32_t flags, buf_alloc, fwd_cnt;
    const struct pv_chain *chain;
};

/* ---- from the guest ---------------------------------------------------------------------------------------------- */

static bool parse_packet(const struct pv_chain *chain, struct packet *p)
{
    struct virtio_vsock_hdr h;

    if (pv_iov_copy_out(chain->iov, chain->out_count, 0, &h, HEADER_SIZE) != HEADER_SIZE)
        return false;
    *p = (struct packet){
        .guest_port = le32toh(h.src_port),
        .host_port = le32toh(h.dst_port),
        .src_cid = le64toh(h.src_cid),
        .dst_cid = le64toh(h.dst_cid),
        .len = le32toh(h.len),
        .type = le16toh(h.type),
        .op = le16toh(h.op),
        .flags = le32toh(h.flags),
        .buf_alloc = le32toh(h.buf_alloc),
        .fwd_cnt = le32toh(h.fwd_cnt),
        .chain = chain,
    };
    return p->len <= chain->out_len - HEADER_SIZE;
}

static void answer_reset(struct pv_vsock *v, const struct packet *p)
{
    struct pv_stray stray = {
        .src_cid = p->dst_cid,
        .dst_cid = p->src_cid,
        .src_port = p->host_port,
        .dst_port = p->guest_port,
        .type = p->type,
    };

    if (p->op != VIRTIO_VSOCK_OP_RST)
        pv_stray_reset(v, &stray);
}

static void note_credit(struct pv_vsock *v, struct pv_conn *c, const struct packet *p)
{
    c->peer_window = p->buf_alloc;
    c->peer_forwarded = p->fwd_cnt;
    if (pv_conn_credit(c) > 0)
        c->credit_asked = false;
    pv_conn_schedule(v, c);
}

static void on_request(struct pv_vsock *v, struct pv_conn *old, const struct packet *p)
{
    int err, fd;
    struct pv_conn *c;

    if (old && old->state != PV_LINGERING) {
        pv_conn_reset(v, old);
        return;
    }
    if (old)
        pv_conn_kill(v, old);
    fd = pv_host_connect(v, p->host_port, &err);
    c = fd >= 0 ? pv_conn_new(v, fd, PV_ESTABLISHED, &err) : NULL;
    if (!c) {
        if (fd >= 0)
            close(fd);
        pv_count(&v->stats.refused, 1);
        answer_reset(v, p);
        return;
    }
    pv_conn_register(v, c, p->guest_port, p->host_port);
    pv_count(&v->stats.opened_by_guest, 1);
    note_credit(v, c, p);
    pv_conn_owe(v, c, PV_OWES_RESPONSE);
}

static void on_response(struct pv_vsock *v, struct pv_conn *c)
{
    if (c->state == PV_REQUESTED && !(c->owes & PV_OWES_REQUEST))
        pv_host_established(v, c);
    else
        pv_conn_reset(v, c);
}

/* The guest knows the connection no more. What it had sent still belongs to the program. */
static void guest_is_done(struct pv_vsock *v, struct pv_conn *c)
{
    if (c->state != PV_ESTABLISHED || c->unsent.used == 0) {
        pv_conn_kill(v, c);
        return;
    }
    pv_conn_leave_table(v, c);
    c->state = PV_DRAINING;
    c->read_closed = true;
    c->owes = 0;
    pv_conn_schedule(v, c);
}

static void on_rst(struct pv_vsock *v, struct pv_conn *c)
{
    pv_count(&v->stats.resets_received, 1);
    guest_is_done(v, c);
}

static void on_shutdown(struct pv_vsock *v, struct pv_conn *c, const struct packet *p)
{
    c->guest_shut |= p->flags & SHUT_BOTH;
    if (c->guest_shut == SHUT_BOTH) {
        answer_reset(v, p);
        guest_is_done(v, c);
        return;
    }
    if (c->state != PV_ESTABLISHED)
        return;
    if (c->guest_shut & VIRTIO_VSOCK_SHUTDOWN_RCV) {
        c->read_closed = true;
        shutdown(c->fd, SHUT_RD);
    }
    pv_host_shut_write(v, c);
    pv_conn_schedule(v, c);
}

static void on_data(struct pv_vsock *v, struct pv_conn *c, const struct packet *p)
{
    struct iovec data[PV_SEGMENTS_MAX];
    unsigned count;

    if (c->state == PV_LINGERING)
        return; /* sent before the guest heard that nobody reads */
    if (p->len > c->window - (c->received - c->forwarded)) {
        pv_count(&v->stats.credit_violations, 1);
        pv_conn_reset(v, c);
        return;
    }
    if (c->guest_shut & VIRTIO_VSOCK_SHUTDOWN_SEND) {
        pv_count(&v->stats.bad_packets, 1);
        pv_conn_reset(v, c);
        return;
    }
    c->received += p->len;
    count = pv_iov_cut(p->chain->iov, p->chain->out_count, HEADER_SIZE, p->len, data, PV_SEGMENTS_MAX);
    pv_host_send(v, c, data, count, p->len);
}

static void on_connection_packet(struct pv_vsock *v, struct pv_conn *c, const struct packet *p)
{
    bool asked = c->state == PV_REQUESTED;

    note_credit(v, c, p);
    if (p->op == VIRTIO_VSOCK_OP_RESPONSE)
        on_response(v, c);
    else if (p->op == VIRTIO_VSOCK_OP_RST)
        on_rst(v, c);
    else if (asked) /* nothing else is an answer */
        pv_conn_reset(v, c);
    else if (p->op == VIRTIO_VSOCK_OP_RW)
        on_data(v, c, p);
    else if (p->op == VIRTIO_VSOCK_OP_SHUTDOWN)
        on_shutdown(v, c, p);
    else if (p->op == VIRTIO_VSOCK_OP_CREDIT_REQUEST)
        pv_conn_owe(v, c, PV_OWES_CREDIT_UPDATE);
    else if (p->op != VIRTIO_VSOCK_OP_CREDIT_UPDATE) {
        pv_count(&v->stats.bad_packets, 1);
        pv_conn_reset(v, c);
    }
}

static void on_packet(struct pv_vsock *v, const struct pv_chain *chain)
{
    struct packet p;
    struct pv_conn *c;

    pv_count(&v->stats.packets_from_guest, 1);
    if (!parse_packet(chain, &p) || p.src_cid != v->config.guest_cid || p.dst_cid != PV_HOST_CID) {
        pv_count(&v->stats.bad_packets, 1);
        return;
    }
    if (p.type != VIRTIO_VSOCK_TYPE_STREAM) {
        pv_count(&v->stats.bad_packets, 1);
        answer_reset(v, &p);
        return;
    }
    c = pv_conn_find(v, p.guest_port, p.host_port);
    if (p.op == VIRTIO_VSOCK_OP_REQUEST)
        on_request(v, c, &p);
    else if (c)
        on_connection_packet(v, c, &p);
    else
        answer_reset(v, &p);
}

/* True: go on; false: nothing more can be done now, and an event will say when it can. */
static bool take_packet(struct pv_vsock *v, struct pv_vq *vq)
{
    struct pv_chain *chain = &v->chains[0];
    int there;

    if (v->stray_count == PV_STRAY_MAX)
        return false; /* the RX ring's kick goes on with this */
    there = pv_vq_peek(vq, &v->fe.mem, 0, chain);
    if (there == 0)
        return pv_vq_enable_kicks(vq);
    if (there < 0) {
        pv_ring_broken(v, PV_TX);
        return false;
    }
    on_packet(v, chain);
    pv_vq_take(vq, chain, 0);
    return true;
}

void pv_guest_process_tx(struct pv_vsock *v)
{
    struct pv_vq *vq = &v->fe.rings[PV_TX].vq;

    if (!v->tx_pending || !v->has_frontend || !pv_fe_ring_live(&v->fe, PV_TX)) {
        v->tx_pending = false;
        return;
    }
    pv_vq_disable_kicks(vq);
    for (int i = 0; i < TX_A_TURN && v->tx_pending; i++)
        v->tx_pending = take_packet(v, vq);
    pv_ring_publish(v, PV_TX);
}

/* ---- to the guest ------------------------------------------------------------------------------------------------ */

/* What became of one turn. */
enum turn { SENT, NOTHING_TO_SEND, NO_CHAIN };

/* Peeks at RX chains. The device may write to them only, and a header and one byte must fit. */
static int peek_rx(struct pv_vsock *v, unsigned ahead, struct pv_chain **chain)
{
    struct pv_vq *vq = &v->fe.rings[PV_RX].vq;
    int there = pv_vq_peek(vq, &v->fe.mem, ahead, &v->chains[ahead]);

    *chain = &v->chains[ahead];
    if (there > 0 && ((*chain)->out_count > 0 || (*chain)->in_len <= HEADER_SIZE)) {
        vq->fault = "ring: RX buffer that is readable or too small";
        there = -1;
    }
    if (there < 0)
        pv_ring_broken(v, PV_RX);
    return there;
}

static void put_packet(struct pv_vsock *v, struct pv_chain *chain, const struct virtio_vsock_hdr *header, uint32_t len)
{
    pv_iov_copy_in(chain->iov, chain->in_count, 0, header, HEADER_SIZE);
    pv_vq_take(&v->fe.rings[PV_RX].vq, chain, (uint32_t)HEADER_SIZE + len);
    pv_count(&v->stats.packets_to_guest, 1);
}

/* Every packet tells the guest how much of its data went on, so every packet is a credit update too. */
static struct virtio_vsock_hdr header_of(const struct pv_vsock *v, struct pv_conn *c, uint16_t op, uint32_t flags,
    uint32_t len)
{
    c->forward_told = c->forwarded;
    c->owes &= (uint8_t)~PV_OWES_CREDIT_UPDATE;
    return (struct virtio_vsock_hdr){
        .src_cid = htole64(PV_HOST_CID),
        .dst_cid = htole64(v->config.guest_cid),
        .src_port = htole32(c->host_port),
        .dst_port = htole32(c->guest_port),
        .len = htole32(len),
        .type = htole16(VIRTIO_VSOCK_TYPE_STREAM),
        .op = htole16(op),
        .flags = htole32(flags),
        .buf_alloc = htole32(c->window),
        .fwd_cnt = htole32(c->forwarded),
    };
}

static enum turn send_stray(struct pv_vsock *v)
{
    const struct pv_stray *stray = &v->strays[v->stray_first];
    struct pv_chain *chain;

    if (peek_rx(v, 0, &chain) <= 0)
        return NO_CHAIN;
    struct virtio_vsock_hdr header = {
        .src_cid = htole64(stray->src_cid),
        .dst_cid = htole64(stray->dst_cid),
        .src_port = htole32(stray->src_port),
        .dst_port = htole32(stray->dst_port),
        .type = htole16(stray->type),
        .op = htole16(VIRTIO_VSOCK_OP_RST),
    };

    put_packet(v, chain, &header, 0);
    pv_count(&v->stats.resets_sent, 1);
    if (v->stray_count-- == PV_STRAY_MAX)
        v->tx_pending = true;
    v->stray_first = (v->stray_first + 1) % PV_STRAY_MAX;
    return SENT;
}

static enum turn send_control(struct pv_vsock *v, struct pv_conn *c, unsigned owed, uint16_t op, uint32_t flags)
{
    struct pv_chain *chain;

    if (peek_rx(v, 0, &chain) <= 0)
        return NO_CHAIN;
    struct virtio_vsock_hdr header = header_of(v, c, op, flags, 0);

    put_packet(v, chain, &header, 0);
    c->owes &= (uint8_t)~owed;
    return SENT;
}

static enum turn send_shutdown(struct pv_vsock *v, struct pv_conn *c)
{
    enum turn turn = send_control(v, c, PV_OWES_SHUTDOWN, VIRTIO_VSOCK_OP_SHUTDOWN, c->host_shut);

    if (turn == SENT && c->host_shut == SHUT_BOTH && c->state == PV_ESTABLISHED)
        pv_conn_linger(v, c);
    return turn;
}

/* Lists the data parts of up to c->batch chains in v->iov, no more bytes than credit. Returns how many chains, or -1
 * (none or broken). */
static int gather(struct pv_vsock *v, const struct pv_conn *c, unsigned *segments, size_t *room)
{
    size_t credit = pv_conn_credit(c);
    unsigned chains = 0;

    *segments = 0;
    *room = 0;
    while (chains < c->batch && *room < credit && *segments + PV_SEGMENTS_MAX <= PV_BATCH_SEGMENTS) {
        struct pv_chain *chain;

        if (peek_rx(v, chains, &chain) <= 0)
            break;
        size_t part = chain->in_len - HEADER_SIZE < credit - *room ? chain->in_len - HEADER_SIZE : credit - *room;

        *segments += pv_iov_cut(chain->iov, chain->in_count, HEADER_SIZE, part, v->iov + *segments,
                                  PV_BATCH_SEGMENTS - *segments);
        *room += part;
        chains++;
    }
    return chains == 0 || v->fe.rings[PV_RX].vq.fault ? -1 : (int)chains;
}

static void put_data(struct pv_vsock *v, struct pv_conn *c, size_t len)
{
    for (unsigned i = 0; len > 0; i++) {
        size_t part = v->chains[i].in_len - HEADER_SIZE < len ? v->chains[i].in_len - HEADER_SIZE : len;
        struct virtio_vsock_hdr header = header_of(v, c, VIRTIO_VSOCK_OP_RW, 0, (uint32_t)part);

        put_packet(v, &v->chains[i], &header, (uint32_t)part);
        c->sent += (uint32_t)part;
        len -= part;
    }
}

static void on_end_of_file(struct pv_vsock *v, struct pv_conn *c)
{
    c->read_closed = true;
    c->host_shut |= VIRTIO_VSOCK_SHUTDOWN_SEND | (c->write_closed ? VIRTIO_VSOCK_SHUTDOWN_RCV : 0);
    pv_conn_owe(v, c, PV_OWES_SHUTDOWN);
}

static enum turn send_data(struct pv_vsock *v, struct pv_conn *c)
{
    unsigned segments;
    size_t room;
    int chains;

    if (pv_conn_credit(c) == 0) {
        enum turn turn = send_control(v, c, 0, VIRTIO_VSOCK_OP_CREDIT_REQUEST, 0);

        c->credit_asked = turn == SENT;
        return turn;
    }
    chains = gather(v, c, &segments, &room);
    if (chains < 0)
        return NO_CHAIN;
    ssize_t got = readv(c->fd, v->iov, (int)segments);

    if (got < 0 && (errno == EAGAIN || errno == EINTR)) {
        c->readable = errno == EINTR;
        return NOTHING_TO_SEND;
    }
    if (got <= 0) {
        c->write_closed |= got < 0; /* ECONNRESET: the program closed without reading everything */
        on_end_of_file(v, c);
        return NOTHING_TO_SEND;
    }
    put_data(v, c, (size_t)got);
    pv_count(&v->stats.bytes_to_guest, (uint64_t)got);
    /* A short read has emptied the socket, so the next byte is an edge; an end of file that was seen already is not. */
    c->readable = (size_t)got == room || c->hangup;
    if ((size_t)got == room)
        c->batch = c->batch < PV_BATCH_MAX ? (uint8_t)(c->batch * 2) : PV_BATCH_MAX;
    else
        c->batch = 1;
    return SENT;
}

static enum turn send_for(struct pv_vsock *v, struct pv_conn *c)
{
    if (c->owes & PV_OWES_REQUEST)
        return send_control(v, c, PV_OWES_REQUEST, VIRTIO_VSOCK_OP_REQUEST, 0);
    if (c->owes & PV_OWES_RESPONSE)
        return send_control(v, c, PV_OWES_RESPONSE, VIRTIO_VSOCK_OP_RESPONSE, 0);
    if (pv_conn_has_data(c)) {
        enum turn turn = send_data(v, c);

        if (turn != NOTHING_TO_SEND)
            return turn;
    }
    if (c->owes & PV_OWES_SHUTDOWN)
        return send_shutdown(v, c);
    if (c->owes & PV_OWES_CREDIT_UPDATE)
        return send_control(v, c, PV_OWES_CREDIT_UPDATE, VIRTIO_VSOCK_OP_CREDIT_UPDATE, 0);
    return NOTHING_TO_SEND;
}

static enum turn next_turn(struct pv_vsock *v)
{
    struct pv_conn *c;
    enum turn turn;

    if (v->stray_count > 0)
        return send_stray(v);
    c = pv_member(v->ready.next, struct pv_conn, ready_link);
    turn = send_for(v, c);
    if (turn != NO_CHAIN) {
        pv_list_remove(&c->ready_link); /* to the end of the queue, if it wants more */
        pv_conn_schedule(v, c);
    }
    return turn;
}

/* True: go on; false: nothing more can be done now, and an event will say when it can. */
static bool give_packet(struct pv_vsock *v, struct pv_vq *vq)
{
    if (v->stray_count == 0 && pv_list_empty(&v->ready))
        return false;
    if (next_turn(v) != NO_CHAIN)
        return true;
    return !vq->fault && pv_vq_enable_kicks(vq);
}

void pv_guest_process_rx(struct pv_vsock *v)
{
    struct pv_vq *vq = &v->fe.rings[PV_RX].vq;

    if (!v->rx_pending || !v->has_frontend || !pv_fe_ring_live(&v->fe, PV_RX)) {
        v->rx_pending = false;
        return;
    }
    pv_vq_disable_kicks(vq);
    for (int i = 0; i < RX_A_TURN && v->rx_pending; i++)
        v->rx_pending = give_packet(v, vq);
    pv_ring_publish(v, PV_RX);
}
