/* A back end that is killed under load, and its successors: nothing acknowledged is lost, nothing is acknowledged twice,
 * and nothing stays unanswered. The back end is a process of its own; the driver, with the guest's memory and the in-flight
 * region, lives on, as QEMU does. */
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "bench.h"
#include "harness.h"
#include "vhost/inflight.h"

#define KILLS 60
#define BLOCKS 512U
#define BLOCK 4096U

static void serve(int fd, int file, unsigned how)
{
    static struct pv_loop loop;
    struct pv_blk_config config = {.queues = 2, .serial = "killed"};
    struct pv_fail fail;
    struct pv_blk *blk;
    int err;

    if (pv_loop_open(&loop, 20000, &err) < 0)
        _exit(1);
    struct pv_data *data = pv_data_file(dup(file), how, &fail);
    struct pv_instance *instance = data ? pv_instance_new("killed", data, &fail) : NULL;
    if (!instance)
        _exit(2);
    pv_instance_attach_loop(instance, &loop);
    if (pv_blk_new(&loop, &config, &blk, &err) < 0 || pv_blk_insert(blk, instance, &err) < 0 ||
        pv_blk_connect(blk, fd, &err) < 0)
        _exit(3);
    pv_loop_run(&loop, &err);
    _exit(4);
}

static pid_t begin(struct drv *drv, int file, bool first)
{
    int pair[2];
    pid_t pid;

    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
    pid = fork();
    CHECK(pid >= 0);
    if (pid == 0)
        serve(pair[0], file, first ? 0 : PV_FILE_QUEUED); /* later ones are killed with more in flight */
    close(pair[0]);
    CHECK(drv_adopt(drv, pair[1], ALL_FEATURES) == 0);
    CHECK(drv_start(drv, first) == 0);
    return pid;
}

struct state {
    struct drv drv;
    uint32_t acknowledged[BLOCKS], sent[BLOCKS]; /* generations */
    unsigned block_of[2][DRV_SLOTS];
    bool busy[2][DRV_SLOTS], block_busy[BLOCKS];
    uint64_t random, answers;
};

static unsigned next_random(struct state *s, unsigned below)
{
    s->random = s->random * 6364136223846793005ULL + 1442695040888963407ULL;
    return (unsigned)(s->random >> 33) % below;
}

static void write_some(struct state *s, unsigned queue)
{
    for (unsigned slot = 0; slot < DRV_SLOTS; slot++) {
        unsigned block = next_random(s, BLOCKS);

        if (s->busy[queue][slot] || s->block_busy[block])
            continue;
        uint32_t *data = (uint32_t *)drv_data(&s->drv, queue, slot);

        s->sent[block]++;
        for (unsigned i = 0; i < BLOCK / 4; i += 2) {
            data[i] = block;
            data[i + 1] = s->sent[block];
        }
        s->busy[queue][slot] = s->block_busy[block] = true;
        s->block_of[queue][slot] = block;
        drv_submit(&s->drv, queue, slot, VIRTIO_BLK_T_OUT, block * (BLOCK / 512), BLOCK);
    }
    drv_kick(&s->drv, queue);
}

static void take_answers(struct state *s, unsigned queue)
{
    int slot;

    while ((slot = drv_take(&s->drv, queue)) >= 0) {
        unsigned block = s->block_of[queue][slot];

        CHECK(s->busy[queue][slot]); /* not twice */
        CHECK_EQ(drv_status(&s->drv, queue, (unsigned)slot), VIRTIO_BLK_S_OK);
        s->busy[queue][slot] = s->block_busy[block] = false;
        s->acknowledged[block] = s->sent[block];
        s->answers++;
    }
}

/* Blocks that nothing is under way to must hold what was acknowledged last, whole. */
static void verify(const struct state *s, int file)
{
    static uint32_t data[BLOCK / 4];

    for (unsigned block = 0; block < BLOCKS; block++) {
        if (s->block_busy[block] || s->acknowledged[block] == 0)
            continue;
        CHECK_EQ(pread(file, data, BLOCK, block * (off_t)BLOCK), BLOCK);
        for (unsigned i = 0; i < BLOCK / 4; i += 2) {
            CHECK_EQ(data[i], block);
            CHECK_EQ(data[i + 1], s->acknowledged[block]);
        }
    }
}

TEST(nothing_is_lost_when_back_ends_are_killed_under_load)
{
    static struct state s;
    int file = memfd_create("disk", MFD_CLOEXEC), status;
    pid_t pid;

    memset(&s, 0, sizeof(s));
    s.random = 20261122;
    CHECK(file >= 0 && ftruncate(file, BLOCKS * (off_t)BLOCK) == 0);
    CHECK(drv_open(&s.drv, 2) == 0);
    pid = begin(&s.drv, file, true);
    for (unsigned kills = 0; kills < KILLS; kills++) {
        for (unsigned rounds = next_random(&s, 40); rounds > 0; rounds--)
            for (unsigned q = 0; q < 2; q++) {
                write_some(&s, q);
                take_answers(&s, q);
            }
        write_some(&s, 0);
        write_some(&s, 1);
        usleep(next_random(&s, 800));
        kill(pid, SIGKILL);
        CHECK(waitpid(pid, &status, 0) == pid && WIFSIGNALED(status));
        drv_hang_up(&s.drv);
        take_answers(&s, 0);
        take_answers(&s, 1);
        verify(&s, file);
        pid = begin(&s.drv, file, false);
    }
    for (unsigned q = 0; q < 2; q++)
        for (unsigned slot = 0; slot < DRV_SLOTS; slot++)
            while (s.busy[q][slot]) {
                CHECK(drv_wait(&s.drv, q, 10000));
                take_answers(&s, q);
            }
    verify(&s, file);
    CHECK(s.answers > KILLS);
    kill(pid, SIGKILL);
    CHECK(waitpid(pid, &status, 0) == pid);
    drv_close(&s.drv);
    close(file);
}

/* ---- the region itself ------------------------------------------------------------------------------------------- */

static struct pv_inflight_queue *region(struct pv_inflight *r)
{
    int err;

    *r = (struct pv_inflight){.fd = -1};
    CHECK(pv_inflight_create(r, 1, 8, &err) == 0);
    return pv_inflight_queue(r, 0, 8);
}

TEST(what_was_taken_is_found_again_in_order)
{
    struct pv_inflight r;
    struct pv_inflight_queue *q = region(&r);
    uint16_t heads[8], batch[8] = {5};

    CHECK_EQ(pv_inflight_recover(q, 8, 100, heads), 0);
    pv_inflight_take(q, 7);
    pv_inflight_take(q, 5);
    pv_inflight_take(q, 2);
    pv_inflight_put(q, 5);
    batch[100 % 8] = 5;
    pv_inflight_done(q, batch, 8, 100, 101);
    CHECK_EQ(pv_inflight_recover(q, 8, 101, heads), 2);
    CHECK(heads[0] == 7 && heads[1] == 2);
    pv_inflight_close(&r);
}

TEST(death_between_publishing_and_unmarking_is_mended)
{
    struct pv_inflight r;
    struct pv_inflight_queue *q = region(&r);
    uint16_t heads[8];

    CHECK_EQ(pv_inflight_recover(q, 8, 65535, heads), 0);
    for (uint16_t head = 0; head < 4; head++)
        pv_inflight_take(q, head);
    pv_inflight_put(q, 1);
    pv_inflight_put(q, 3);
    /* here the used index went from 65535 to 1, and the process died */
    CHECK_EQ(pv_inflight_recover(q, 8, 1, heads), 2);
    CHECK(heads[0] == 0 && heads[1] == 2);
    pv_inflight_close(&r);
}

TEST(death_before_publishing_leaves_all_in_flight)
{
    struct pv_inflight r;
    struct pv_inflight_queue *q = region(&r);
    uint16_t heads[8];

    CHECK_EQ(pv_inflight_recover(q, 8, 0, heads), 0);
    pv_inflight_take(q, 1);
    pv_inflight_take(q, 2);
    pv_inflight_put(q, 2);
    CHECK_EQ(pv_inflight_recover(q, 8, 0, heads), 2);
    CHECK(heads[0] == 1 && heads[1] == 2);
    pv_inflight_close(&r);
}

TEST(a_region_of_another_ring_is_refused)
{
    struct pv_inflight r;
    struct pv_inflight_queue *q = region(&r);
    uint16_t heads[8];

    CHECK_EQ(pv_inflight_recover(q, 8, 0, heads), 0);
    CHECK_EQ(pv_inflight_recover(q, 4, 0, heads), -1);
    CHECK_EQ(pv_inflight_recover(q, 8, 50, heads), -1);
    q->version = 9;
    CHECK_EQ(pv_inflight_recover(q, 8, 0, heads), -1);
    CHECK(pv_inflight_queue(&r, 1, 8) == NULL && pv_inflight_queue(&r, 0, 16) == NULL);
    pv_inflight_close(&r);
}
