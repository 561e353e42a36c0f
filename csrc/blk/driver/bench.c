/* hv-blk-bench: drives a vhost-user-blk back end without a guest, and says how fast it was.
 *
 *     hv-blk-bench SOCKET read|write DEPTH SECONDS SPAN_MIB [poll]
 *
 * Random 4 KiB requests over the disk's first SPAN_MIB. "poll": the front end spins on the used ring, as a guest that
 * never sleeps; otherwise it sleeps until it is interrupted. Prints one line of JSON: requests a second, latencies
 * in us. / */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "driver.h"

#define REQUEST 4096U
#define BUCKETS 4096 /* of 0.25 us */

static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000U + (uint64_t)now.tv_nsec;
}

static uint64_t random_state = 88172645463325252ULL;

static uint64_t next_random(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    return random_state ^= random_state << 17;
}

struct run {
    struct drv drv;
    uint32_t type;
    unsigned depth;
    uint64_t blocks;
    uint64_t begun[DRV_SLOTS];
    uint64_t histogram[BUCKETS];
    uint64_t done;
};

static void submit(struct run *run, unsigned slot)
{
    run->begun[slot] = now_ns();
    drv_submit(&run->drv, 0, slot, run->type, next_random() % run->blocks * (REQUEST / 512), REQUEST);
}

static void note(struct run *run, unsigned slot, uint64_t now)
{
    uint64_t bucket = (now - run->begun[slot]) / 250;

    run->histogram[bucket < BUCKETS ? bucket : BUCKETS - 1]++;
    run->done++;
}

/* Ends with nothing in flight: a back end may be confused by a front end that hangs up in the middle of requests. */
static int drive(struct run *run, uint64_t end)
{
    unsigned in_flight = run->depth;

    for (unsigned i = 0; i < run->depth; i++)
        submit(run, i);
    drv_kick(&run->drv, 0);
    for (uint64_t now = 0; in_flight > 0;) {
        int slot;

        if (!drv_wait(&run->drv, 0, 10000)) {
            fprintf(stderr, "hv-blk-bench: no answer within 10 s\n");
            return -1;
        }
        now = now_ns();
        while ((slot = drv_take(&run->drv, 0)) >= 0) {
            if (drv_status(&run->drv, 0, (unsigned)slot) != VIRTIO_BLK_S_OK) {
                fprintf(stderr, "hv-blk-bench: a request failed\n");
                return -1;
            }
            note(run, (unsigned)slot, now);
            if (now < end)
                submit(run, (unsigned)slot);
            else
                in_flight--;
        }
        drv_kick(&run->drv, 0);
    }
    return 0;
}

static double percentile(const struct run *run, double part)
{
    uint64_t seen = 0;

    for (unsigned i = 0; i < BUCKETS; i++) {
        seen += run->histogram[i];
        if ((double)seen >= part * (double)run->done)
            return (i + 0.5) / 4;
    }
    return BUCKETS / 4.0;
}

int main(int argc, char **argv)
{
    static struct run run;
    struct virtio_blk_config config;
    uint64_t begin, span;
    double seconds;
    uint64_t wanted = (1ULL << VIRTIO_RING_F_EVENT_IDX) | (1ULL << VIRTIO_RING_F_INDIRECT_DESC) |
                      (1ULL << VIRTIO_BLK_F_FLUSH);

    if (argc < 6) {
        fprintf(stderr, "usage: hv-blk-bench SOCKET read|write DEPTH SECONDS SPAN_MIB [poll]\n");
        return 2;
    }
    run.type = strcmp(argv[2], "write") ? VIRTIO_BLK_T_IN : VIRTIO_BLK_T_OUT;
    run.depth = (unsigned)atoi(argv[3]);
    seconds = atof(argv[4]);
    span = strtoull(argv[5], NULL, 10) << 20;
    if (run.depth < 1 || run.depth > DRV_SLOTS || drv_open(&run.drv, 1) < 0)
        return 2;
    run.drv.polling = argc > 6 && !strcmp(argv[6], "poll");
    if (run.drv.polling)
        wanted &= ~(1ULL << VIRTIO_RING_F_EVENT_IDX);
    if (drv_connect(&run.drv, argv[1], wanted) < 0 || drv_config(&run.drv, &config) < 0 || drv_start(&run.drv, true) < 0)
        return 1;
    run.blocks = (config.capacity * 512 < span ? config.capacity * 512 : span) / REQUEST;
    if (run.blocks == 0)
        return 2;
    begin = now_ns();
    if (drive(&run, begin + (uint64_t)(seconds * 1e9)) < 0)
        return 1;
    seconds = (double)(now_ns() - begin) / 1e9;
    printf("{\"iops\": %.0f, \"p50_us\": %.2f, \"p99_us\": %.2f, \"kicks\": %llu, \"interrupts\": %llu}\n",
        (double)run.done / seconds, percentile(&run, 0.5), percentile(&run, 0.99), (unsigned long long)run.drv.kicks,
        (unsigned long long)run.drv.calls);
    drv_close(&run.drv);
    return 0;
}
