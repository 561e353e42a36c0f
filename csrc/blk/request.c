/* A request of the guest: what it says is checked, its data stays where it is, in the guest's memory. */
#include <endian.h>
#include <errno.h>
#include <linux/virtio_blk.h>
#include <stdlib.h>
#include <string.h>

#include "device.h"
#include "percpu/trace_point.h"

#define SECTOR 512U
#define BATCH 64 /* requests of one ring before the other rings, and other devices, have their turn */
#define RETRY_NS 200000000ULL
#define ID_BYTES 20U
#define HEADER_SIZE sizeof(struct virtio_blk_outhdr)

/* ---- the free list ----------------------------------------------------------------------------------------------- */

static struct pv_blk_request *take_spare(struct pv_blk *blk)
{
    struct pv_blk_request *request;

    if (pv_list_empty(&blk->spare)) {
        request = calloc(1, sizeof(*request));
        if (request)
            request->blk = blk;
        return request;
    }
    request = pv_member(blk->spare.prev, struct pv_blk_request, link); /* the one used last: it is in the cache */
    pv_list_remove(&request->link);
    return request;
}

static void give_spare(struct pv_blk_request *request)
{
    pv_list_append(&request->blk->spare, &request->link);
}

void pv_blk_free_requests(struct pv_blk *blk)
{
    while (!pv_list_empty(&blk->spare)) {
        struct pv_blk_request *request = pv_member(blk->spare.next, struct pv_blk_request, link);

        pv_list_remove(&request->link);
        free(request);
    }
}

/* ---- ends -------------------------------------------------------------------------------------------------------- */

static void drop(struct pv_blk *blk)
{
    if (pv_fe_drop(&blk->fe))
        pv_loop_defer(blk->loop, &blk->resume);
}

static void end(struct pv_blk_request *request, uint8_t status)
{
    struct pv_blk *blk = request->blk;
    struct pv_chain *chain = &request->chain;
    struct iovec last = {.iov_base = request->status, .iov_len = 1};

    *request->status = status;
    PV_TRACE_SPAN(PV_TRACE_BLOCK, request->started, chain->in_len + chain->out_len);
    pv_fe_log_written(&blk->fe, chain->iov + chain->out_count, chain->in_count, chain->in_len);
    pv_fe_log_written(&blk->fe, &last, 1, 1);
    pv_vq_push(&blk->fe.rings[request->ring].vq, chain->head, (uint32_t)chain->in_len);
    blk->dirty |= 1U << request->ring;
    give_spare(request);
    pv_loop_defer(blk->loop, &blk->publish);
    drop(blk);
}

static void refuse(struct pv_blk_request *request, uint8_t status)
{
    pv_blk_count(&request->blk->stats.refused, 1);
    end(request, status);
}

/* ---- the host's disk is full
 * --------------------------------------------------------------------------------------- */

static void park(struct pv_blk_request *request)
{
    struct pv_blk *blk = request->blk;

    if (pv_list_empty(&blk->parked))
        pv_loop_arm(blk->loop, &blk->retry, pv_loop_clock_ns() + RETRY_NS);
    pv_list_append(&blk->parked, &request->link);
    pv_blk_count(&blk->stats.waiting, 1);
    if (blk->fe.draining || blk->leaving)
        pv_blk_unpark(blk);
}

static struct pv_blk_request *take_parked(struct pv_blk *blk)
{
    struct pv_blk_request *request = pv_member(blk->parked.next, struct pv_blk_request, link);

    pv_list_remove(&request->link);
    pv_blk_count(&blk->stats.waiting, (uint64_t)-1);
    return request;
}

void pv_blk_retry(struct pv_blk *blk)
{
    struct pv_link all;

    /* What is parked again meanwhile is for the next time. */
    pv_list_init(&all);
    while (!pv_list_empty(&blk->parked))
        pv_list_append(&all, &take_parked(blk)->link);
    while (!pv_list_empty(&all)) {
        struct pv_blk_request *request = pv_member(all.next, struct pv_blk_request, link);

        pv_list_remove(&request->link);
        if (request->io.offset + request->io.length > blk->instance->size) /* the disk has become smaller */
            refuse(request, VIRTIO_BLK_S_IOERR);
        else
            pv_instance_submit(blk->instance, &request->io, 0);
    }
}

void pv_blk_unpark(struct pv_blk *blk)
{
    pv_loop_disarm(blk->loop, &blk->retry);
    while (!pv_list_empty(&blk->parked)) {
        struct pv_blk_request *request = take_parked(blk);

        if (blk->fe.rings[request->ring].vq.inflight) { /* its mark stays: it comes again */
            give_spare(request);
            drop(blk);
        } else {
            end(request, VIRTIO_BLK_S_IOERR);
        }
    }
}

static void done(struct pv_io *io)
{
    struct pv_blk_request *request = (struct pv_blk_request *)io;

    if (io->error == ENOSPC && io->type != PV_IO_READ) {
        park(request);
        return;
    }
    if (io->error)
        pv_blk_count(&request->blk->stats.failed, 1);
    end(request, io->error == 0 ? VIRTIO_BLK_S_OK : io->error == ENOTSUP ? VIRTIO_BLK_S_UNSUPP : VIRTIO_BLK_S_IOERR);
}

/* ---- what a chain says
 * --------------------------------------------------------------------------------------------- */

/* Takes the header's bytes off the front and the status byte off the end, in place. False: one of them is missing. */
static bool strip(struct pv_blk_request *request, struct virtio_blk_outhdr *header)
{
    struct pv_chain *chain = &request->chain;
    size_t left = HEADER_SIZE;
    unsigned used = 0;

    if (chain->out_len < HEADER_SIZE || chain->in_len < 1)
        return false;
    struct iovec *last = &chain->iov[chain->out_count + chain->in_count - 1];

    pv_iov_copy_out(chain->iov, chain->out_count, 0, header, HEADER_SIZE);
    request->status = (uint8_t *)last->iov_base + last->iov_len - 1;
    last->iov_len--;
    while (used < chain->out_count && chain->iov[used].iov_len <= left)
        left -= chain->iov[used++].iov_len;
    if (left > 0) {
        chain->iov[used].iov_base = (uint8_t *)chain->iov[used].iov_base + left;
        chain->iov[used].iov_len -= left;
    }
    request->io.iov = chain->iov + used;
    request->io.iov_count = chain->out_count - used;
    return true;
}

/* Whether the range lies within what the guest may know of the disk; a disk that ends earlier says so itself. */
static bool in_range(const struct pv_blk *blk, uint64_t sector, uint64_t length)
{
    uint64_t size = blk->instance ? blk->instance->size : pv_blk_capacity(blk);

    return length > 0 && length % SECTOR == 0 && sector <= size / SECTOR && length <= size - sector * SECTOR;
}

static void submit(struct pv_blk_request *request)
{
    struct pv_blk *blk = request->blk;

    request->io.done = done;
    request->io.owner = blk;
    if (!(blk->fe.features & (1ULL << VIRTIO_BLK_F_FLUSH)) && request->io.type != PV_IO_READ)
        request->io.flags |= PV_IO_FUA;
    if (blk->instance) {
        pv_instance_submit(blk->instance, &request->io, 0);
        return;
    }
    if (request->io.type == PV_IO_READ)
        pv_iov_zero(request->io.iov, request->io.iov_count, 0, request->io.length);
    if (request->io.type == PV_IO_READ || request->io.type == PV_IO_FLUSH)
        end(request, VIRTIO_BLK_S_OK);
    else
        refuse(request, VIRTIO_BLK_S_IOERR);
}

static void transfer(struct pv_blk_request *request, enum pv_io_type type, uint64_t sector)
{
    struct pv_chain *chain = &request->chain;

    request->io.type = type;
    request->io.length = type == PV_IO_READ ? chain->in_len - 1 : chain->out_len - HEADER_SIZE;
    if (type == PV_IO_READ) {
        unsigned count = chain->in_count;

        request->io.iov = chain->iov + chain->out_count;
        /* the status may have had a segment of its own */
        request->io.iov_count = chain->iov[chain->out_count + count - 1].iov_len ? count : count - 1;
    }
    if ((type == PV_IO_WRITE && request->blk->config.read_only) || request->io.length > PV_IO_LENGTH_MAX ||
        !in_range(request->blk, sector, request->io.length)) {
        refuse(request, VIRTIO_BLK_S_IOERR);
        return;
    }
    request->io.offset = sector * SECTOR;
    submit(request);
}

static void flush(struct pv_blk_request *request)
{
    request->io.type = PV_IO_FLUSH;
    request->io.offset = request->io.length = 0;
    request->io.iov = NULL;
    request->io.iov_count = 0;
    if (request->blk->config.read_only)
        end(request, VIRTIO_BLK_S_OK);
    else
        submit(request);
}

static void get_id(struct pv_blk_request *request)
{
    struct pv_chain *chain = &request->chain;
    char id[ID_BYTES] = {0};

    memcpy(id, request->blk->config.serial, strlen(request->blk->config.serial));
    pv_iov_copy_in(chain->iov + chain->out_count, chain->in_count, 0, id, sizeof(id));
    end(request, VIRTIO_BLK_S_OK);
}

/* Discard and write-zeroes: one range, for max_discard_seg is 1. */
static void erase(struct pv_blk_request *request, enum pv_io_type type)
{
    struct virtio_blk_discard_write_zeroes range;
    uint32_t flags;
    uint64_t length;

    if (request->chain.out_len - HEADER_SIZE != sizeof(range) || request->blk->config.read_only) {
        refuse(request, VIRTIO_BLK_S_IOERR);
        return;
    }
    pv_iov_copy_out(request->io.iov, request->io.iov_count, 0, &range, sizeof(range));
    flags = le32toh(range.flags);
    length = (uint64_t)le32toh(range.num_sectors) * SECTOR;
    if ((flags & ~VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP) || (type == PV_IO_DISCARD && flags)) {
        refuse(request, VIRTIO_BLK_S_UNSUPP);
        return;
    }
    if (length > (uint64_t)PV_BLK_DISCARD_SECTORS * SECTOR || !in_range(request->blk, le64toh(range.sector), length)) {
        refuse(request, VIRTIO_BLK_S_IOERR);
        return;
    }
    request->io.type = type;
    request->io.flags = flags ? PV_IO_UNMAP : 0;
    request->io.offset = le64toh(range.sector) * SECTOR;
    request->io.length = length;
    request->io.iov = NULL;
    request->io.iov_count = 0;
    submit(request);
}

/* -1: the chain is no request at all. */
static int handle(struct pv_blk_request *request)
{
    struct virtio_blk_outhdr header;

    request->io.flags = 0;
    if (!strip(request, &header))
        return -1;
    switch (le32toh(header.type)) {
    case VIRTIO_BLK_T_IN:
        transfer(request, PV_IO_READ, le64toh(header.sector));
        break;
    case VIRTIO_BLK_T_OUT:
        transfer(request, PV_IO_WRITE, le64toh(header.sector));
        break;
    case VIRTIO_BLK_T_FLUSH:
        flush(request);
        break;
    case VIRTIO_BLK_T_GET_ID:
        get_id(request);
        break;
    case VIRTIO_BLK_T_DISCARD:
        erase(request, PV_IO_DISCARD);
        break;
    case VIRTIO_BLK_T_WRITE_ZEROES:
        erase(request, PV_IO_WRITE_ZEROES);
        break;
    default:
        refuse(request, VIRTIO_BLK_S_UNSUPP);
    }
    return 0;
}

static void ring_broken(struct pv_blk *blk, unsigned ring, const char *fault)
{
    blk->fe.rings[ring].vq.fault = fault;
    pv_blk_count(&blk->stats.ring_faults, 1);
    pv_blk_set_fault(blk, fault);
    pv_fe_ring_broken(&blk->fe, ring);
}

bool pv_blk_serve(struct pv_blk *blk, unsigned ring)
{
    struct pv_vq *vq = &blk->fe.rings[ring].vq;
    unsigned count;

    for (count = 0; count < BATCH && pv_fe_ring_live(&blk->fe, ring); count++) {
        bool resumed = vq->resume_next < vq->resume_count;
        struct pv_blk_request *request = pv_vq_has_more(vq) ? take_spare(blk) : NULL;

        if (!request)
            break;
        int got = pv_vq_pop(vq, &blk->fe.mem, &request->chain);

        if (got <= 0) {
            give_spare(request);
            if (got < 0)
                ring_broken(blk, ring, vq->fault);
            break;
        }
        request->ring = ring;
        request->started = PV_TRACE_NOW();
        pv_fe_hold(&blk->fe);
        pv_blk_count(&blk->stats.requests, 1);
        if (resumed)
            pv_blk_count(&blk->stats.resumed, 1);
        if (handle(request) < 0) {
            give_spare(request);
            drop(blk);
            ring_broken(blk, ring, "ring: a request without header or status");
        }
    }
    return count > 0;
}
