/* A vhost-user front end and a guest's driver, as small as the tests allow: no QEMU, guest RAM in a memfd.
 *
 * The guest's physical memory is one memfd, shown to the device as two regions that meet at FE_SPLIT. A guest physical
 * address is the offset into it; a user address is that plus FE_USER. The device runs in a thread of its own, the front
 * end in the caller's. Every wait here is for a descriptor, with a time limit that fails the test.
 */
#ifndef TEST_FRONTEND_H
#define TEST_FRONTEND_H

#include <linux/virtio_ring.h>
#include <linux/virtio_vsock.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "vsock/vsock.h"

#define FE_RAM (16U << 20)
#define FE_SPLIT (8U << 20)
#define FE_USER 0x700000000000ULL
#define FE_CID 42
#define FE_RX 0
#define FE_TX 1
#define FE_SLOT 0x20000U /* of guest memory for one TX chain */
#define FE_TX_BASE 0x5f8000U
#define FE_RX_BASE 0x100000U
#define FE_HEADER 44U

#define FE_EVENT_IDX (1ULL << 29)
#define FE_INDIRECT (1ULL << 28)
#define FE_VERSION_1 (1ULL << 32)
#define FE_PROTOCOL_FEATURES (1ULL << 30)
#define FE_FEATURES (FE_EVENT_IDX | FE_INDIRECT | FE_VERSION_1 | FE_PROTOCOL_FEATURES)

struct fe_ring {
    unsigned num;
    uint32_t desc_addr, avail_addr, used_addr;
    struct vring_desc *desc;
    struct vring_avail *avail;
    struct vring_used *used;
    uint16_t avail_idx, last_used;
    int kick, call, err;
};

struct fe {
    struct pv_vsock_config config; /* fill in limits before fe_open */
    uint64_t features;
    unsigned rx_num, tx_num;
    uint32_t rx_buffer;  /* bytes of one RX buffer, header included */
    uint16_t base;       /* where both rings begin */

    char dir[64], path[96];
    struct pv_vsock *device;
    pthread_t thread;
    bool running;
    int result, err; /* of pv_vsock_run */
    int sock, memfd;
    uint8_t *ram;
    struct fe_ring rings[2];
};

struct packet {
    struct virtio_vsock_hdr hdr;
    uint8_t data[65536];
};

/* Life. fe_open makes the device and its thread; fe_start connects, negotiates and starts both rings with RX
 * buffers. */
void fe_init(struct fe *fe);
void fe_open(struct fe *fe);
void fe_connect(struct fe *fe);
void fe_start(struct fe *fe);
void fe_up(struct fe *fe); /* all of the above */
void fe_down(struct fe *fe);

/* vhost-user. */
void fe_send(struct fe *fe, uint32_t request, uint32_t flags, const void *payload, uint32_t size, const int *fds,
    unsigned fd_count);
uint64_t fe_ask(struct fe *fe, uint32_t request);
uint64_t fe_ack(struct fe *fe, uint32_t request, const void *payload, uint32_t size, const int *fds, unsigned fd_count);
uint32_t fe_receive(struct fe *fe, void *payload, uint32_t size);
bool fe_is_dropped(struct fe *fe);
void fe_set_memory(struct fe *fe);
void fe_start_ring(struct fe *fe, unsigned ring, uint16_t base);
uint16_t fe_stop_ring(struct fe *fe, unsigned ring);
void fe_wait_ring_error(struct fe *fe, unsigned ring);

/* The driver. */
void fe_kick(struct fe *fe, unsigned ring);
void fe_publish(struct fe *fe, unsigned ring, uint16_t head);
void fe_give_rx(struct fe *fe, unsigned slot);
void fe_reclaim_tx(struct fe *fe);
uint32_t fe_tx_slot(struct fe *fe);
void fe_transmit(struct fe *fe, const struct virtio_vsock_hdr *hdr, const void *data, uint32_t len, unsigned segments);
bool fe_try_take(struct fe *fe, struct packet *packet);
void fe_take(struct fe *fe, struct packet *packet);
void fe_expect(struct fe *fe, struct packet *packet, uint16_t op, uint32_t guest_port, uint32_t host_port);
bool fe_wait_call(struct fe *fe, unsigned ring, int timeout_ms);

/* Packets of the guest. */
struct virtio_vsock_hdr fe_hdr(uint16_t op, uint32_t guest_port, uint32_t host_port);
void fe_op(struct fe *fe, uint16_t op, uint32_t guest_port, uint32_t host_port);
void fe_shutdown(struct fe *fe, uint32_t guest_port, uint32_t host_port, uint32_t flags);
void fe_data(struct fe *fe, uint32_t guest_port, uint32_t host_port, const void *data, uint32_t len);
void fe_credit(struct fe *fe, uint32_t guest_port, uint32_t host_port, uint32_t buf_alloc, uint32_t fwd_cnt);

/* Programs of the host. */
int host_socket(struct fe *fe);
int host_ask(struct fe *fe, uint32_t port);                             /* connected, CONNECT sent */
int host_open(struct fe *fe, uint32_t guest_port, uint32_t *host_port); /* ... and accepted by the guest */
int host_listen(struct fe *fe, uint32_t port);
void host_write(int fd, const void *data, size_t len);
void host_read(int fd, void *data, size_t len);
bool host_at_end(int fd);
void host_unlink(struct fe *fe, uint32_t port);

struct pv_vsock_stats fe_stats(struct fe *fe);
void fe_wait_stat(struct fe *fe, size_t offset, uint64_t value);
#define FE_WAIT_STAT(fe, field, value) fe_wait_stat(fe, offsetof(struct pv_vsock_stats, field), value)
void pattern(uint8_t *data, size_t len, uint64_t offset);

#endif
