/* What the device says of itself: features and configuration space. */
#include <endian.h>
#include <linux/virtio_blk.h>
#include <linux/virtio_config.h>
#include <string.h>

#include "device.h"

#define SECTOR 512U
#define RING_FEATURES ((1ULL << VIRTIO_RING_F_INDIRECT_DESC) | (1ULL << VIRTIO_RING_F_EVENT_IDX))
#define BIT(feature) (1ULL << (feature))

uint64_t pv_blk_capacity(const struct pv_blk *blk)
{
    if (blk->config.announce_bytes)
        return blk->config.announce_bytes;
    return blk->instance ? blk->instance->size : 0;
}

static void fill_config(const struct pv_blk *blk, struct virtio_blk_config *config)
{
    uint32_t block_size = blk->config.block_size;

    *config = (struct virtio_blk_config){
        .capacity = htole64(pv_blk_capacity(blk) / SECTOR),
        .seg_max = htole32(PV_BLK_SEGMENTS),
        .blk_size = htole32(block_size),
        .num_queues = htole16((uint16_t)blk->config.queues),
        .max_discard_sectors = htole32(PV_BLK_DISCARD_SECTORS),
        .max_discard_seg = htole32(1),
        .discard_sector_alignment = htole32(block_size / SECTOR),
        .max_write_zeroes_sectors = htole32(PV_BLK_DISCARD_SECTORS),
        .max_write_zeroes_seg = htole32(1),
        .write_zeroes_may_unmap = 1,
    };
}

/* A front end may know a longer structure than we do: the rest is zero. */
static int get_config(void *opaque, uint32_t offset, uint8_t *data, uint32_t size)
{
    uint8_t space[PV_CONFIG_MAX] = {0};
    struct virtio_blk_config config;

    if (offset > sizeof(space) || size > sizeof(space) - offset)
        return -1;
    fill_config(opaque, &config);
    memcpy(space, &config, sizeof(config));
    memcpy(data, space + offset, size);
    return 0;
}

/* No CONFIG_WCE: the mode would be lost with this process. A driver that does not take VIRTIO_BLK_F_FLUSH gets
 * writes that are durable when they end. */
void pv_blk_fill_type(struct pv_blk *blk)
{
    uint64_t features = BIT(VIRTIO_F_VERSION_1) | RING_FEATURES | PV_F_LOG_ALL | BIT(VIRTIO_BLK_F_SEG_MAX) |
                        BIT(VIRTIO_BLK_F_BLK_SIZE) | BIT(VIRTIO_BLK_F_FLUSH) | BIT(VIRTIO_BLK_F_MQ);

    if (blk->config.read_only)
        features |= BIT(VIRTIO_BLK_F_RO);
    else
        features |= BIT(VIRTIO_BLK_F_DISCARD) | BIT(VIRTIO_BLK_F_WRITE_ZEROES);
    blk->type.features = features;
    blk->type.protocol_features = PV_PROTOCOL_MQ | PV_PROTOCOL_LOG_SHMFD | PV_PROTOCOL_REPLY_ACK |
                                  PV_PROTOCOL_BACKEND_REQ | PV_PROTOCOL_CONFIG | PV_PROTOCOL_INFLIGHT;
    blk->type.rings = blk->config.queues;
    blk->type.queue_max = PV_BLK_QUEUE_MAX;
    blk->type.holds = true;
    blk->type.get_config = get_config;
}
