/* A device on a loop of its own thread, a disk whose requests the test can hold or fail, and a driver at the other end. */
#ifndef TEST_BLK_BENCH_H
#define TEST_BLK_BENCH_H

#include <pthread.h>

#include "blk/blk.h"
#include "blk/driver/driver.h"
#include "common/loop.h"
#include "iofilter/instance.h"

#define DISK_BYTES (8U << 20)
#define ALL_FEATURES UINT64_MAX

/* Memory, but requests of the types in `hold` wait for bench_release, and those in `fail` end with `error`. */
struct disk {
    struct pv_data data;
    uint8_t *bytes;
    uint32_t hold, fail;
    int error;
    uint32_t last_flags;
    uint64_t seen[PV_IO_TYPES];
    struct pv_link held;
    unsigned held_count;
};

struct bench {
    struct pv_loop loop;
    pthread_t thread;
    struct disk *disk;
    struct pv_instance *instance;
    struct pv_blk *blk;
    unsigned gone; /* how often; atomic */
    struct drv drv;
    struct pv_blk_config config; /* to be filled in before bench_up */
};

void bench_init(struct bench *bench);
/* The device's thread runs; the driver is connected with these features, and its queues are started. */
void bench_up(struct bench *bench, unsigned queues, uint64_t features);
void bench_down(struct bench *bench);

/* On the loop's thread. */
void bench_hold(struct bench *bench, uint32_t types);
void bench_release(struct bench *bench);
void bench_fail(struct bench *bench, uint32_t types, int error);
void bench_connect(struct bench *bench, uint64_t features);

void bench_wait_held(struct bench *bench, unsigned count);
struct pv_blk_stats bench_stats(struct bench *bench);
#define BENCH_WAIT(condition)                                     \
    do {                                                          \
        for (unsigned tries_ = 0; !(condition); tries_++) {       \
            CHECK(tries_ < 20000);                                \
            usleep(500);                                          \
        }                                                         \
    } while (0)

#endif
