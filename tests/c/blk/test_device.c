/* The device from the guest's side: what each request does, and what a hostile guest gets. */
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "bench.h"
#include "harness.h"
#include "vhost/vhost_user.h"

/* ---- the disk ---------------------------------------------------------------------------------------------------- */

static void carry_out(struct disk *disk, struct pv_io *io)
{
    if (disk->fail & (1U << io->type)) {
        pv_io_end(io, disk->error);
        return;
    }
    if (io->type == PV_IO_READ)
        pv_iov_copy_in(io->iov, io->iov_count, 0, disk->bytes + io->offset, io->length);
    else if (io->type == PV_IO_WRITE)
        pv_iov_copy_out(io->iov, io->iov_count, 0, disk->bytes + io->offset, io->length);
    else if (io->type != PV_IO_FLUSH)
        memset(disk->bytes + io->offset, 0, io->length);
    pv_io_end(io, 0);
}

static void disk_submit(struct pv_data *data, struct pv_io *io)
{
    struct disk *disk = (struct disk *)data;

    disk->seen[io->type]++;
    disk->last_flags = io->flags;
    if (disk->hold & (1U << io->type)) {
        pv_list_append(&disk->held, &io->link);
        __atomic_store_n(&disk->held_count, disk->held_count + 1, __ATOMIC_RELEASE);
    } else {
        carry_out(disk, io);
    }
}

static void disk_close(struct pv_data *data)
{
    struct disk *disk = (struct disk *)data;

    free(disk->bytes);
    free(disk);
}

static int disk_resize(struct pv_data *data, uint64_t size, struct pv_fail *fail)
{
    (void)fail;
    data->size = size;
    return size <= DISK_BYTES ? 0 : -1;
}

static const struct pv_data_class DISK = {.name = "test", .submit = disk_submit, .close = disk_close, .resize = disk_resize};

/* ---- the bench --------------------------------------------------------------------------------------------------- */

static void *run(void *opaque)
{
    struct bench *bench = opaque;
    int err;

    CHECK(pv_loop_run(&bench->loop, &err) == 0);
    return NULL;
}

static void on_gone(struct pv_blk *blk, void *context)
{
    struct bench *bench = context;

    (void)blk;
    __atomic_fetch_add(&bench->gone, 1, __ATOMIC_RELEASE);
}

void bench_init(struct bench *bench)
{
    memset(bench, 0, sizeof(*bench));
    bench->config = (struct pv_blk_config){.queues = 1, .serial = "test-disk", .gone = on_gone, .gone_context = bench};
}

static void make(void *opaque)
{
    struct bench *bench = opaque;
    int err;

    pv_instance_attach_loop(bench->instance, &bench->loop);
    CHECK(pv_blk_new(&bench->loop, &bench->config, &bench->blk, &err) == 0);
    CHECK(pv_blk_insert(bench->blk, bench->instance, &err) == 0);
}

struct adopted {
    struct bench *bench;
    int fd;
};

static void adopt(void *opaque)
{
    struct adopted *a = opaque;
    int err;

    CHECK(pv_blk_connect(a->bench->blk, a->fd, &err) == 0);
}

void bench_connect(struct bench *bench, uint64_t features)
{
    int pair[2];

    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
    struct adopted a = {bench, pair[0]};
    pv_loop_call(&bench->loop, adopt, &a);
    CHECK(drv_adopt(&bench->drv, pair[1], features) == 0);
}

void bench_up(struct bench *bench, unsigned queues, uint64_t features)
{
    struct pv_fail fail;
    int err;

    bench->config.queues = queues;
    bench->disk = calloc(1, sizeof(*bench->disk));
    bench->disk->bytes = calloc(1, DISK_BYTES);
    bench->disk->data = (struct pv_data){.class = &DISK, .size = DISK_BYTES, .block_size = 512};
    bench->disk->data.read_only = bench->config.read_only;
    pv_list_init(&bench->disk->held);
    bench->instance = pv_instance_new("disk", &bench->disk->data, &fail);
    CHECK(bench->instance);
    CHECK(pv_loop_open(&bench->loop, 20000, &err) == 0);
    CHECK(pthread_create(&bench->thread, NULL, run, bench) == 0);
    pv_loop_call(&bench->loop, make, bench);
    CHECK(drv_open(&bench->drv, queues) == 0);
    bench_connect(bench, features);
    CHECK(drv_start(&bench->drv, true) == 0);
}

static void quiet(struct pv_instance *instance, void *context)
{
    (void)instance;
    (void)context;
}

static void unmake(void *opaque)
{
    struct bench *bench = opaque;
    struct pv_fail fail;

    pv_blk_free(bench->blk);
    CHECK(pv_instance_quiesce(bench->instance, quiet, NULL, &fail) == 0);
    CHECK(bench->instance->state == PV_QUIET);
    pv_instance_detach_loop(bench->instance);
}

void bench_down(struct bench *bench)
{
    struct pv_fail fail;
    unsigned gone = __atomic_load_n(&bench->gone, __ATOMIC_ACQUIRE);

    if (bench->drv.sock >= 0) {
        drv_hang_up(&bench->drv);
        bench_release(bench);
        BENCH_WAIT(__atomic_load_n(&bench->gone, __ATOMIC_ACQUIRE) > gone);
    }
    pv_loop_call(&bench->loop, unmake, bench);
    pv_loop_stop(&bench->loop);
    pthread_join(bench->thread, NULL);
    pv_loop_close(&bench->loop);
    CHECK(pv_instance_free(bench->instance, &fail) == 0);
    drv_close(&bench->drv);
}

struct setting {
    struct bench *bench;
    uint32_t types;
    int error;
};

static void set_hold(void *opaque)
{
    struct setting *s = opaque;

    s->bench->disk->hold = s->types;
}

static void set_fail(void *opaque)
{
    struct setting *s = opaque;

    s->bench->disk->fail = s->types;
    s->bench->disk->error = s->error;
}

static void release_all(void *opaque)
{
    struct disk *disk = ((struct bench *)opaque)->disk;

    disk->hold = 0;
    while (!pv_list_empty(&disk->held)) {
        struct pv_io *io = pv_member(disk->held.next, struct pv_io, link);

        pv_list_remove(&io->link);
        __atomic_store_n(&disk->held_count, disk->held_count - 1, __ATOMIC_RELEASE);
        carry_out(disk, io);
    }
}

void bench_hold(struct bench *bench, uint32_t types)
{
    struct setting s = {.bench = bench, .types = types};

    pv_loop_call(&bench->loop, set_hold, &s);
}

void bench_fail(struct bench *bench, uint32_t types, int error)
{
    struct setting s = {bench, types, error};

    pv_loop_call(&bench->loop, set_fail, &s);
}

void bench_release(struct bench *bench)
{
    pv_loop_call(&bench->loop, release_all, bench);
}

void bench_wait_held(struct bench *bench, unsigned count)
{
    BENCH_WAIT(__atomic_load_n(&bench->disk->held_count, __ATOMIC_ACQUIRE) == count);
}

struct pv_blk_stats bench_stats(struct bench *bench)
{
    struct pv_blk_stats stats;

    pv_blk_get_stats(bench->blk, &stats);
    return stats;
}

static void nothing(void *opaque)
{
    (void)opaque;
}

/* The disk, as of after all that its thread has done. */
static struct disk *look(struct bench *bench)
{
    pv_loop_call(&bench->loop, nothing, NULL);
    return bench->disk;
}

/* ---- requests ---------------------------------------------------------------------------------------------------- */

static void fill(uint8_t *data, size_t len, uint8_t seed)
{
    for (size_t i = 0; i < len; i++)
        data[i] = (uint8_t)(seed + i * 7 + i / 251);
}

static void round_trip(uint64_t features)
{
    static const uint32_t LENGTHS[] = {512, 4096, 65536, DRV_DATA};
    struct bench b;
    uint8_t expected[DRV_DATA];

    bench_init(&b);
    bench_up(&b, 1, features);
    for (unsigned i = 0; i < sizeof(LENGTHS) / sizeof(LENGTHS[0]); i++) {
        uint32_t len = LENGTHS[i];

        fill(expected, len, (uint8_t)i);
        memcpy(drv_data(&b.drv, 0, 0), expected, len);
        CHECK_EQ(drv_do(&b.drv, 0, VIRTIO_BLK_T_OUT, 8 + i, len), VIRTIO_BLK_S_OK);
        memset(drv_data(&b.drv, 0, 0), 0, len);
        CHECK_EQ(drv_do(&b.drv, 0, VIRTIO_BLK_T_IN, 8 + i, len), VIRTIO_BLK_S_OK);
        CHECK(memcmp(drv_data(&b.drv, 0, 0), expected, len) == 0);
    }
    CHECK_EQ(bench_stats(&b).requests, 8);
    bench_down(&b);
}

TEST(what_is_written_is_read)
{
    round_trip(ALL_FEATURES);
}

TEST(what_is_written_is_read_without_event_idx_and_indirect_descriptors)
{
    round_trip(1ULL << VIRTIO_BLK_F_FLUSH);
}

TEST(many_requests_of_several_queues_are_under_way_at_once)
{
    struct bench b;
    unsigned done = 0;

    bench_init(&b);
    bench_up(&b, DRV_QUEUES, ALL_FEATURES);
    bench_hold(&b, 1U << PV_IO_WRITE);
    for (unsigned q = 0; q < DRV_QUEUES; q++)
        for (unsigned i = 0; i < DRV_SLOTS; i++) {
            memset(drv_data(&b.drv, q, i), (int)(q * 64 + i), 512);
            drv_submit(&b.drv, q, i, VIRTIO_BLK_T_OUT, q * 64 + i, 512);
            drv_kick(&b.drv, q);
        }
    bench_wait_held(&b, DRV_QUEUES * DRV_SLOTS);
    bench_release(&b);
    for (unsigned q = 0; q < DRV_QUEUES; q++)
        for (unsigned i = 0; i < DRV_SLOTS; i++) {
            CHECK(drv_wait(&b.drv, q, 10000));
            int slot = drv_take(&b.drv, q);

            CHECK(slot >= 0);
            CHECK_EQ(drv_status(&b.drv, q, (unsigned)slot), VIRTIO_BLK_S_OK);
            done++;
        }
    for (unsigned i = 0; i < DRV_QUEUES * 64; i++)
        CHECK_EQ(look(&b)->bytes[i * 512], i & 255);
    CHECK_EQ(done, DRV_QUEUES * DRV_SLOTS);
    bench_down(&b);
}

TEST(flush_id_discard_and_write_zeroes)
{
    struct bench b;
    struct virtio_blk_discard_write_zeroes range = {.sector = 2, .num_sectors = 4};

    bench_init(&b);
    bench_up(&b, 1, ALL_FEATURES);
    memset(look(&b)->bytes, 0xaa, 8192);
    CHECK_EQ(drv_do(&b.drv, 0, VIRTIO_BLK_T_FLUSH, 0, 0), VIRTIO_BLK_S_OK);
    CHECK_EQ(look(&b)->seen[PV_IO_FLUSH], 1);
    memset(drv_data(&b.drv, 0, 0), 0xff, 20);
    CHECK_EQ(drv_do(&b.drv, 0, VIRTIO_BLK_T_GET_ID, 0, 20), VIRTIO_BLK_S_OK);
    CHECK(memcmp(drv_data(&b.drv, 0, 0), "test-disk\0\0\0\0\0\0\0\0\0\0\0", 20) == 0);
    memcpy(drv_data(&b.drv, 0, 0), &range, sizeof(range));
    CHECK_EQ(drv_do(&b.drv, 0, VIRTIO_BLK_T_DISCARD, 0, sizeof(range)), VIRTIO_BLK_S_OK);
    CHECK_EQ(look(&b)->seen[PV_IO_DISCARD], 1);
    CHECK(look(&b)->bytes[1023] == 0xaa && look(&b)->bytes[1024] == 0 && look(&b)->bytes[3071] == 0 && look(&b)->bytes[3072] == 0xaa);
    range.flags = VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
    memcpy(drv_data(&b.drv, 0, 0), &range, sizeof(range));
    CHECK_EQ(drv_do(&b.drv, 0, VIRTIO_BLK_T_WRITE_ZEROES, 0, sizeof(range)), VIRTIO_BLK_S_OK);
    CHECK_EQ(look(&b)->last_flags, PV_IO_UNMAP);
    CHECK_EQ(drv_do(&b.drv, 0, VIRTIO_BLK_T_DISCARD, 0, sizeof(range)), VIRTIO_BLK_S_UNSUPP);
    range.flags = 2;
    memcpy(drv_data(&b.drv, 0, 0), &range, sizeof(range));
    CHECK_EQ(drv_do(&b.drv, 0, VIRTIO_BLK_T_WRITE_ZEROES, 0, sizeof(range)), VIRTIO_BLK_S_UNSUPP);
    bench_down(&b);
}

TEST(without_a_write_back_cache_each_write_is_durable)
{
    struct bench b;

    bench_init(&b);
    bench_up(&b, 1, 0);
    CHECK_EQ(drv_do(&b.drv, 0, VIRTIO_BLK_T_OUT, 0, 512), VIRTIO_BLK_S_OK);
    CHECK_EQ(look(&b)->last_flags, PV_IO_FUA);
    bench_down(&b);
    bench_init(&b);
    bench_up(&b, 1, ALL_FEATURES);
    CHECK_EQ(drv_do(&b.drv, 0, VIRTIO_BLK_T_OUT, 0, 512), VIRTIO_BLK_S_OK);
    CHECK_EQ(look(&b)->last_flags, 0);
    bench_down(&b);
}

TEST(requests_that_make_no_sense_fail)
{
    static const struct {
        uint32_t type;
        uint64_t sector;
        uint32_t len;
        uint8_t status;
    } BAD[] = {
        {VIRTIO_BLK_T_IN, DISK_BYTES / 512, 512, VIRTIO_BLK_S_IOERR},
        {VIRTIO_BLK_T_OUT, DISK_BYTES / 512 - 1, 1024, VIRTIO_BLK_S_IOERR},
        {VIRTIO_BLK_T_IN, UINT64_MAX, 512, VIRTIO_BLK_S_IOERR},
        {VIRTIO_BLK_T_OUT, UINT64_MAX / 512 + 1, 512, VIRTIO_BLK_S_IOERR},
        {VIRTIO_BLK_T_IN, 0, 511, VIRTIO_BLK_S_IOERR},
        {VIRTIO_BLK_T_OUT, 0, 100, VIRTIO_BLK_S_IOERR},
        {VIRTIO_BLK_T_OUT, 0, 0, VIRTIO_BLK_S_IOERR},
        {VIRTIO_BLK_T_DISCARD, 0, 15, VIRTIO_BLK_S_IOERR},
        {VIRTIO_BLK_T_DISCARD, 0, 32, VIRTIO_BLK_S_IOERR},
        {77, 0, 512, VIRTIO_BLK_S_UNSUPP},
        {VIRTIO_BLK_T_SECURE_ERASE, 0, 16, VIRTIO_BLK_S_UNSUPP},
    };
    struct bench b;

    bench_init(&b);
    bench_up(&b, 1, ALL_FEATURES);
    for (unsigned i = 0; i < sizeof(BAD) / sizeof(BAD[0]); i++)
        CHECK_EQ(drv_do(&b.drv, 0, BAD[i].type, BAD[i].sector, BAD[i].len), BAD[i].status);
    CHECK_EQ(bench_stats(&b).refused, sizeof(BAD) / sizeof(BAD[0]));
    CHECK_EQ(drv_do(&b.drv, 0, VIRTIO_BLK_T_IN, 0, 512), VIRTIO_BLK_S_OK);
    bench_down(&b);
}

TEST(a_read_only_device_takes_no_writes)
{
    struct bench b;

    bench_init(&b);
    b.config.read_only = 1;
    bench_up(&b, 1, ALL_FEATURES);
    CHECK(b.drv.features & (1ULL << VIRTIO_BLK_F_RO));
    CHECK(!(b.drv.features & (1ULL << VIRTIO_BLK_F_DISCARD)));
    CHECK_EQ(drv_do(&b.drv, 0, VIRTIO_BLK_T_OUT, 0, 512), VIRTIO_BLK_S_IOERR);
    CHECK_EQ(drv_do(&b.drv, 0, VIRTIO_BLK_T_DISCARD, 0, 16), VIRTIO_BLK_S_IOERR);
    CHECK_EQ(drv_do(&b.drv, 0, VIRTIO_BLK_T_FLUSH, 0, 0), VIRTIO_BLK_S_OK);
    CHECK_EQ(drv_do(&b.drv, 0, VIRTIO_BLK_T_IN, 0, 512), VIRTIO_BLK_S_OK);
    bench_down(&b);
}

TEST(errors_of_the_disk_reach_the_guest)
{
    struct bench b;

    bench_init(&b);
    bench_up(&b, 1, ALL_FEATURES);
    bench_fail(&b, 1U << PV_IO_READ, EIO);
    CHECK_EQ(drv_do(&b.drv, 0, VIRTIO_BLK_T_IN, 0, 512), VIRTIO_BLK_S_IOERR);
    bench_fail(&b, 1U << PV_IO_FLUSH, ENOTSUP);
    CHECK_EQ(drv_do(&b.drv, 0, VIRTIO_BLK_T_FLUSH, 0, 0), VIRTIO_BLK_S_UNSUPP);
    CHECK_EQ(bench_stats(&b).failed, 2);
    bench_down(&b);
}

/* ---- a host without space ---------------------------------------------------------------------------------------- */

TEST(a_write_waits_while_the_host_has_no_space)
{
    struct bench b;

    bench_init(&b);
    bench_up(&b, 1, ALL_FEATURES);
    bench_fail(&b, 1U << PV_IO_WRITE, ENOSPC);
    drv_submit(&b.drv, 0, 0, VIRTIO_BLK_T_OUT, 0, 512);
    drv_kick(&b.drv, 0);
    BENCH_WAIT(bench_stats(&b).waiting == 1);
    CHECK_EQ(drv_take(&b.drv, 0), -1);
    bench_fail(&b, 0, 0);
    CHECK(drv_wait(&b.drv, 0, 10000));
    CHECK_EQ(drv_take(&b.drv, 0), 0);
    CHECK_EQ(drv_status(&b.drv, 0, 0), VIRTIO_BLK_S_OK);
    CHECK_EQ(bench_stats(&b).waiting, 0);
    bench_down(&b);
}

/* The VM is paused meanwhile: the write comes again when it goes on. */
TEST(a_write_that_waits_for_space_lives_through_a_pause)
{
    struct bench b;
    uint16_t base;

    bench_init(&b);
    bench_up(&b, 1, ALL_FEATURES);
    bench_fail(&b, 1U << PV_IO_WRITE, ENOSPC);
    drv_submit(&b.drv, 0, 0, VIRTIO_BLK_T_OUT, 0, 512);
    drv_kick(&b.drv, 0);
    BENCH_WAIT(bench_stats(&b).waiting == 1);
    CHECK(drv_stop(&b.drv, 0, &base) == 0);
    CHECK_EQ(drv_take(&b.drv, 0), -1);
    bench_fail(&b, 0, 0);
    CHECK(drv_start(&b.drv, false) == 0);
    CHECK(drv_wait(&b.drv, 0, 10000));
    CHECK_EQ(drv_take(&b.drv, 0), 0);
    CHECK_EQ(drv_status(&b.drv, 0, 0), VIRTIO_BLK_S_OK);
    CHECK_EQ(bench_stats(&b).resumed, 1);
    bench_down(&b);
}

/* ---- front ends that come and go --------------------------------------------------------------------------------- */

TEST(a_ring_is_given_back_when_its_requests_have_ended)
{
    struct bench b;
    struct pollfd p;
    uint16_t base;

    bench_init(&b);
    bench_up(&b, 1, ALL_FEATURES);
    bench_hold(&b, 1U << PV_IO_READ);
    for (unsigned i = 0; i < 4; i++)
        drv_submit(&b.drv, 0, i, VIRTIO_BLK_T_IN, i, 512);
    drv_kick(&b.drv, 0);
    bench_wait_held(&b, 4);
    uint32_t state[2] = {0, 0};
    CHECK(drv_send(&b.drv, 11, 0, state, sizeof(state), NULL, 0) == 0);
    p = (struct pollfd){.fd = b.drv.sock, .events = POLLIN};
    CHECK_EQ(poll(&p, 1, 50), 0);
    /* what comes now is not taken any more */
    drv_submit(&b.drv, 0, 4, VIRTIO_BLK_T_IN, 4, 512);
    drv_kick(&b.drv, 0);
    bench_release(&b);
    CHECK(drv_receive(&b.drv, 11, state, sizeof(state), NULL) == 0);
    CHECK_EQ(state[1], 4);
    for (unsigned i = 0; i < 4; i++)
        CHECK(drv_take(&b.drv, 0) >= 0);
    CHECK_EQ(drv_take(&b.drv, 0), -1);
    CHECK(drv_start(&b.drv, false) == 0);
    CHECK(drv_wait(&b.drv, 0, 10000));
    CHECK_EQ(drv_take(&b.drv, 0), 4);
    CHECK(drv_stop(&b.drv, 0, &base) == 0);
    CHECK_EQ(base, 5);
    bench_down(&b);
}

TEST(a_front_end_that_leaves_amid_requests_is_followed_by_another)
{
    struct bench b;

    bench_init(&b);
    bench_up(&b, 1, ALL_FEATURES);
    bench_hold(&b, 1U << PV_IO_WRITE);
    for (unsigned i = 0; i < 8; i++)
        drv_submit(&b.drv, 0, i, VIRTIO_BLK_T_OUT, i, 512);
    drv_kick(&b.drv, 0);
    bench_wait_held(&b, 8);
    drv_hang_up(&b.drv);
    usleep(20000);
    CHECK_EQ(__atomic_load_n(&b.gone, __ATOMIC_ACQUIRE), 0);
    bench_release(&b);
    BENCH_WAIT(__atomic_load_n(&b.gone, __ATOMIC_ACQUIRE) == 1);
    bench_connect(&b, ALL_FEATURES);
    CHECK(drv_start(&b.drv, false) == 0);
    for (unsigned i = 0; i < 8; i++)
        CHECK(drv_take(&b.drv, 0) >= 0);
    CHECK_EQ(drv_do(&b.drv, 0, VIRTIO_BLK_T_IN, 0, 512), VIRTIO_BLK_S_OK);
    bench_down(&b);
}

/* ---- configuration ----------------------------------------------------------------------------------------------- */

static void resize(void *opaque)
{
    struct bench *b = opaque;
    struct pv_fail fail;

    CHECK(pv_instance_quiesce(b->instance, quiet, NULL, &fail) == 0);
    CHECK(pv_instance_resize(b->instance, DISK_BYTES / 2, &fail) == 0);
    pv_instance_resume(b->instance);
}

TEST(a_new_size_is_announced)
{
    struct bench b;
    struct virtio_blk_config config;
    uint32_t message[3];

    bench_init(&b);
    bench_up(&b, 1, ALL_FEATURES);
    CHECK(recv(b.drv.backend, message, sizeof(message), MSG_DONTWAIT) < 0);
    CHECK(drv_config(&b.drv, &config) == 0);
    CHECK_EQ(config.capacity, DISK_BYTES / 512);
    pv_loop_call(&b.loop, resize, &b);
    CHECK_EQ(recv(b.drv.backend, message, sizeof(message), 0), sizeof(message));
    CHECK(message[0] == 2 && message[2] == 0);
    CHECK(drv_config(&b.drv, &config) == 0);
    CHECK_EQ(config.capacity, DISK_BYTES / 1024);
    CHECK_EQ(drv_do(&b.drv, 0, VIRTIO_BLK_T_IN, DISK_BYTES / 1024, 512), VIRTIO_BLK_S_IOERR);
    bench_down(&b);
}

TEST(an_announced_capacity_stays_what_lies_beyond_the_disk_fails)
{
    struct bench b;
    struct virtio_blk_config config;

    bench_init(&b);
    b.config.announce_bytes = 1ULL << 50;
    bench_up(&b, 1, ALL_FEATURES);
    CHECK(drv_config(&b.drv, &config) == 0);
    CHECK_EQ(config.capacity, 1ULL << 41);
    CHECK_EQ(drv_do(&b.drv, 0, VIRTIO_BLK_T_IN, 1ULL << 40, 512), VIRTIO_BLK_S_IOERR);
    CHECK_EQ(drv_do(&b.drv, 0, VIRTIO_BLK_T_OUT, 0, 512), VIRTIO_BLK_S_OK);
    bench_down(&b);
}

/* ---- a hostile guest --------------------------------------------------------------------------------------------- */

static void publish_head(struct bench *b, uint16_t head)
{
    struct drv_queue *q = &b->drv.queue[0];

    q->avail->ring[q->avail_idx % DRV_NUM] = head;
    __atomic_store_n(&q->avail->idx, ++q->avail_idx, __ATOMIC_RELEASE);
    drv_kick(&b->drv, 0);
}

static void expect_broken(struct bench *b, const char *fault)
{
    struct pollfd p = {.fd = b->drv.queue[0].err, .events = POLLIN};

    CHECK_EQ(poll(&p, 1, 10000), 1);
    CHECK(strcmp(pv_blk_fault(b->blk), fault) == 0);
    CHECK_EQ(bench_stats(b).ring_faults, 1);
    bench_down(b);
}

TEST(a_chain_without_a_header_breaks_the_ring)
{
    struct bench b;

    bench_init(&b);
    bench_up(&b, 1, ALL_FEATURES);
    b.drv.queue[0].desc[0] = (struct vring_desc){0, 8, VRING_DESC_F_NEXT, 1};
    b.drv.queue[0].desc[1] = (struct vring_desc){0, 1, VRING_DESC_F_WRITE, 0};
    publish_head(&b, 0);
    expect_broken(&b, "ring: a request without header or status");
}

TEST(a_chain_without_a_status_breaks_the_ring)
{
    struct bench b;

    bench_init(&b);
    bench_up(&b, 1, ALL_FEATURES);
    b.drv.queue[0].desc[0] = (struct vring_desc){0, 512, 0, 0};
    publish_head(&b, 0);
    expect_broken(&b, "ring: a request without header or status");
}

TEST(a_chain_that_is_under_way_cannot_be_used_again)
{
    struct bench b;

    bench_init(&b);
    bench_up(&b, 1, ALL_FEATURES);
    bench_hold(&b, 1U << PV_IO_READ);
    drv_submit(&b.drv, 0, 1, VIRTIO_BLK_T_IN, 0, 512);
    drv_kick(&b.drv, 0);
    bench_wait_held(&b, 1);
    publish_head(&b, 3);
    expect_broken(&b, "ring: a chain that is in flight was made available again");
}

TEST(header_and_status_may_lie_in_pieces)
{
    struct bench b;
    struct drv_queue *q = &b.drv.queue[0];
    struct virtio_blk_outhdr header = {.type = VIRTIO_BLK_T_OUT, .sector = 5};
    uint64_t at;

    bench_init(&b);
    bench_up(&b, 1, ALL_FEATURES);
    at = drv_data_addr(&b.drv, 0, 0);
    memcpy(b.drv.ram + at, &header, sizeof(header));
    memset(b.drv.ram + at + 16, 0x5a, 512);
    /* 3 bytes of the header, the rest of it with the data's beginning, the rest of the data */
    q->desc[0] = (struct vring_desc){at, 3, VRING_DESC_F_NEXT, 1};
    q->desc[1] = (struct vring_desc){at + 3, 113, VRING_DESC_F_NEXT, 2};
    q->desc[2] = (struct vring_desc){at + 116, 412, VRING_DESC_F_NEXT, 3};
    q->desc[3] = (struct vring_desc){at + 4096, 1, VRING_DESC_F_WRITE, 0};
    b.drv.ram[at + 4096] = 0xff;
    publish_head(&b, 0);
    CHECK(drv_wait(&b.drv, 0, 10000));
    CHECK_EQ(b.drv.ram[at + 4096], VIRTIO_BLK_S_OK);
    CHECK(look(&b)->bytes[5 * 512] == 0x5a && look(&b)->bytes[5 * 512 + 511] == 0x5a && look(&b)->bytes[6 * 512] == 0);
    drv_take(&b.drv, 0);
    /* a read whose status is the last byte of its data's segment */
    header = (struct virtio_blk_outhdr){.type = VIRTIO_BLK_T_IN, .sector = 5};
    memcpy(b.drv.ram + at, &header, sizeof(header));
    q->desc[0] = (struct vring_desc){at, 16, VRING_DESC_F_NEXT, 1};
    q->desc[1] = (struct vring_desc){at + 8192, 513, VRING_DESC_F_WRITE, 0};
    b.drv.ram[at + 8192 + 512] = 0xff;
    publish_head(&b, 0);
    CHECK(drv_wait(&b.drv, 0, 10000));
    CHECK_EQ(b.drv.ram[at + 8192 + 512], VIRTIO_BLK_S_OK);
    CHECK(b.drv.ram[at + 8192] == 0x5a && b.drv.ram[at + 8192 + 511] == 0x5a);
    drv_take(&b.drv, 0);
    bench_down(&b);
}
