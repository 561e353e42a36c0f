/* The filter `integrity`: flipped bits are found, and nothing else is called one: not writes under way, not kills, not power cuts. */
#include <fcntl.h>

#include "crashy.h"
#include "iofilter/filters/common/map.h"
#include "model.h"

#define SIZE (3 * MIB)

static struct pv_loop loop;
static char folder[] = "/tmp/pv-integrity-XXXXXX";
static char state[64], live[80], settings[200];

static void forget(void)
{
    unlink(state);
    unlink(live);
}

static void it_is_as_a_disk(void)
{
    struct pv_instance *disk = memory_disk("d", SIZE, &loop);
    uint8_t *model = calloc(1, SIZE);
    struct pv_filter *filter;
    unsigned seed = 3;

    create("integrity", settings, SIZE);
    filter = attach(disk, "integrity", settings);
    for (int i = 0; i < 60; i++)
        random_batch(disk, model, SIZE, &seed);
    CHECK(!disk_do(disk, PV_IO_DISCARD, 0, NULL, 100 * KIB, 0));
    memset(model, 0, 100 * KIB);
    check_all(disk, model, SIZE);
    CHECK(figure(filter, "bad_blocks") == 0 && figure(filter, "checked_blocks") > 1000);
    disk_close(disk);
    free(model);
    forget();
}

static void neighbours_do_not_undo_one_another(void)
{
    struct pv_instance *disk = memory_disk("d", SIZE, &loop);

    create("integrity", settings, SIZE);
    attach(disk, "delay", "us=0 jitter_us=1000 types=read,write");
    attach(disk, "integrity", settings);
    for (uint64_t block = 0; block < 128 * KIB; block += 4096)
        write_neighbours(disk, block);
    disk_close(disk);
    forget();
}

static void a_flipped_bit_is_found(void)
{
    uint8_t *now = calloc(1, SIZE), *durable = calloc(1, SIZE), *data = pattern(SIZE, 1), *seen = malloc(SIZE);
    struct pv_instance *disk = disk_on("d", crashy_data(now, durable, SIZE), &loop);
    struct pv_filter *filter;

    create("integrity", settings, SIZE);
    filter = attach(disk, "integrity", settings);
    CHECK(!disk_write(disk, 0, data, SIZE));
    for (unsigned round = 0; round < 20; round++) {
        uint64_t at = (round * 149321u) % SIZE;

        now[at] ^= 1 << round % 8;
        CHECK(disk_read(disk, at / 512 * 512, seen, 512) == EIO && figure(filter, "last_bad_offset") == at / 4096 * 4096);
        CHECK(disk_write(disk, at / 512 * 512, data, 512) == EIO); /* the rest of the block would be made good */
        CHECK(disk_read(disk, 0, seen, SIZE) == EIO && !disk_read(disk, (at / 4096 + 1) % (SIZE / 4096) * 4096, seen, 4096));
        now[at] ^= 1 << round % 8;
        CHECK(!disk_read(disk, at / 4096 * 4096, seen, 4096));
    }
    now[5] ^= 1;
    CHECK(!disk_write(disk, 0, data, 4096) && !disk_read(disk, 0, seen, 4096) && !memcmp(seen, data, 4096)); /* written anew */
    CHECK(!disk_do(disk, PV_IO_FLUSH, 0, NULL, 0, 0));
    disk_close(disk);
    disk = disk_on("d", crashy_data(now, durable, SIZE), &loop); /* and after it was closed */
    attach(disk, "integrity", settings);
    now[2 * MIB] ^= 4;
    CHECK(disk_read(disk, 2 * MIB, seen, 4096) == EIO && !disk_read(disk, 0, seen, 2 * MIB));
    disk_close(disk);
    free(now);
    free(durable);
    free(data);
    free(seen);
    forget();
}

/* A disk that has data already: the first read learns, the second checks. */
static void it_learns(void)
{
    uint8_t *now = pattern(SIZE, 9), *durable = pattern(SIZE, 9), *seen = malloc(SIZE);
    struct pv_instance *disk = disk_on("d", crashy_data(now, durable, SIZE), &loop);
    struct pv_filter *filter;

    create("integrity", settings, SIZE);
    filter = attach(disk, "integrity", settings);
    CHECK(!disk_read(disk, 0, seen, MIB) && figure(filter, "learned_blocks") == 256);
    now[77] ^= 1;
    now[MIB + 77] ^= 1;
    CHECK(disk_read(disk, 0, seen, 4096) == EIO && !disk_read(disk, MIB, seen, 4096));
    disk_close(disk);
    free(now);
    free(durable);
    free(seen);
    forget();
}

/* Reads and writes of the same blocks at once, slow and in any order below: never a false alarm. */
static void writes_under_way_are_no_alarm(void)
{
    static struct call calls[64];
    static uint8_t data[64][8192];
    struct pv_instance *disk = memory_disk("d", SIZE, &loop);
    struct pv_filter *filter;
    unsigned seed = 12;

    create("integrity", settings, SIZE);
    attach(disk, "delay", "us=10 jitter_us=800 types=read,write");
    filter = attach(disk, "integrity", settings);
    for (int round = 0; round < 30; round++) {
        for (unsigned i = 0; i < 64; i++) {
            enum pv_io_type type = rand_r(&seed) % 3 ? PV_IO_READ : PV_IO_WRITE;
            uint64_t length = (1 + (uint64_t)rand_r(&seed) % 16) * 512;

            memset(data[i], rand_r(&seed), sizeof data[i]);
            call_start(&calls[i], disk, type, (uint64_t)rand_r(&seed) % 64 * 512, data[i], length, 0);
        }
        for (unsigned i = 0; i < 64; i++)
            CHECK(!call_wait(&calls[i], &loop));
    }
    CHECK(figure(filter, "bad_blocks") == 0);
    disk_close(disk);
    forget();
}

static void a_kill_in_a_write_is_no_alarm(void)
{
    uint8_t *now = calloc(1, SIZE), *durable = calloc(1, SIZE), *data = pattern(SIZE, 1), *seen = malloc(SIZE), *old;
    struct pv_instance *disk;
    struct call call;

    create("integrity", settings, SIZE);
    for (unsigned applied = 0; applied < 2; applied++) {
        char command[400];

        disk = disk_on("d", crashy_data(now, durable, SIZE), &loop);
        attach(disk, "integrity", settings);
        CHECK(!disk_write(disk, 0, data, 64 * KIB));
        old = malloc(64 * KIB);
        memcpy(old, data, 64 * KIB);
        memset(data, 17 + (int)applied, 64 * KIB);
        disk_quiesce(disk);
        { /* below the filter: the write stays there for ever, and has been carried out or not */
            struct settings_text parsed;
            struct pv_fail fail;
            struct pv_filter *delay = pv_filter_open(disk, "delay", "slow", settings_of(&parsed, "us=3600000000 types=write"), &fail);

            CHECK(delay && !pv_instance_insert(disk, delay, 1, &fail));
        }
        pv_instance_resume(disk);
        call_start(&call, disk, PV_IO_WRITE, 0, data, 64 * KIB, 0);
        turn(&loop);
        CHECK(!call.over);
        snprintf(command, sizeof command, "cp --sparse=always %s %s.k && cp --sparse=always %s %s.k.live", state, state, live, state);
        CHECK(!system(command));
        if (!applied)
            memcpy(data, old, 64 * KIB);
        memcpy(seen, now, SIZE);
        disk_quiesce(disk);
        pv_instance_resume(disk);
        CHECK(call.over);
        disk_close(disk);
        if (!applied)
            memcpy(now, seen, SIZE); /* the write never came to the disk */
        snprintf(command, sizeof command, "mv %s.k %s && mv %s.k.live %s", state, state, state, live);
        CHECK(!system(command));
        disk = disk_on("d", crashy_data(now, durable, SIZE), &loop);
        attach(disk, "integrity", settings);
        CHECK(!disk_read(disk, 0, seen, 64 * KIB) && !memcmp(seen, data, 64 * KIB));
        CHECK(!disk_write(disk, 512, data + 512, 512));
        now[60000] ^= 1;
        CHECK(disk_read(disk, 57344, seen, 8192) == EIO);
        now[60000] ^= 1;
        disk_close(disk);
        free(old);
    }
    free(now);
    free(durable);
    free(data);
    free(seen);
    forget();
}

static void a_power_cut_is_no_alarm(void)
{
    static char boots[30][20];
    uint8_t *now = calloc(1, SIZE), *durable = calloc(1, SIZE), *model = calloc(1, SIZE), *seen = malloc(SIZE);
    struct pv_instance *disk;
    struct pv_filter *filter;
    unsigned seed = 4;
    uint64_t relearned = 0;

    create("integrity", settings, SIZE);
    for (int round = 0; round < 30; round++) {
        snprintf(boots[round], sizeof boots[round], "boot%d", round);
        pv_boot_id_for_tests = boots[round];
        disk = disk_on("d", crashy_data(now, durable, SIZE), &loop);
        filter = attach(disk, "integrity", settings);
        CHECK(!disk_read(disk, 0, seen, SIZE) && !disk_read(disk, 0, model, SIZE) && !memcmp(seen, model, SIZE));
        random_batch(disk, model, SIZE, &seed);
        if (round % 2)
            CHECK(!disk_do(disk, PV_IO_FLUSH, 0, NULL, 0, 0));
        random_batch(disk, model, SIZE, &seed);
        for (int i = 0; i < 10; i++) /* no flush behind these */
            CHECK(!disk_write(disk, (uint64_t)(rand_r(&seed) % (SIZE / 512)) * 512, seen, 512));
        relearned += figure(filter, "relearned_blocks");
        CHECK(figure(filter, "bad_blocks") == 0);
        disk_close(disk);
        crashy_power_cut(now, durable, SIZE, &seed);
    }
    CHECK(relearned > 0);
    pv_boot_id_for_tests = NULL;
    free(now);
    free(durable);
    free(model);
    free(seen);
    forget();
}

static void bad_settings_are_refused(void)
{
    struct pv_instance *disk = memory_disk("d", SIZE + 512, &loop);

    refused(disk, "integrity", settings, "multiple of 4096");
    refused(disk, "integrity", "", "state is not set");
    disk_close(disk);
    disk = memory_disk("d", SIZE, &loop);
    refused(disk, "integrity", settings, "No such file");
    refused(disk, "integrity", "state=/x learn=perhaps", "yes or no");
    disk_close(disk);
}

int main(void)
{
    int err;

    CHECK(mkdtemp(folder) && !pv_loop_open(&loop, 0, &err));
    snprintf(state, sizeof state, "%s/sums", folder);
    snprintf(live, sizeof live, "%s/sums.live", folder);
    snprintf(settings, sizeof settings, "state=%s", state);
    it_is_as_a_disk();
    neighbours_do_not_undo_one_another();
    a_flipped_bit_is_found();
    it_learns();
    writes_under_way_are_no_alarm();
    a_kill_in_a_write_is_no_alarm();
    a_power_cut_is_no_alarm();
    bad_settings_are_refused();
    pv_loop_close(&loop);
    CHECK(!rmdir(folder));
    return 0;
}
