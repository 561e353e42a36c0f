/* The filter `mirror`: both sides are the same in the end, whatever happened to the second one, to the process, or to the guest's memory. */
#include <fcntl.h>
#include <pthread.h>

#include "crashy.h"
#include "iofilter/filters/common/map.h"
#include "model.h"

#define SIZE (4 * MIB)

static struct pv_loop loop;
static char folder[] = "/tmp/pv-mirror-XXXXXX";
static char state[64], live[80], settings[200];

static void forget(void)
{
    unlink(state);
    unlink(live);
}

struct sides {
    uint8_t *first, *first_flushed, *second, *second_flushed;
    struct pv_instance *target, *disk;
    struct pv_filter *mirror;
};

static void open_sides(struct sides *sides)
{
    struct pv_fail fail;

    sides->target = disk_on("second", crashy_data(sides->second, sides->second_flushed, SIZE), &loop);
    CHECK(!pv_instance_publish(sides->target, &fail));
    sides->disk = disk_on("first", crashy_data(sides->first, sides->first_flushed, SIZE), &loop);
    sides->mirror = attach(sides->disk, "mirror", settings);
}

static void close_sides(struct sides *sides)
{
    disk_close(sides->disk);
    pv_instance_withdraw(sides->target);
    disk_close(sides->target);
}

static void new_sides(struct sides *sides)
{
    sides->first = pattern(SIZE, 1);
    sides->first_flushed = pattern(SIZE, 1);
    sides->second = calloc(1, SIZE);
    sides->second_flushed = calloc(1, SIZE);
    create("mirror", settings, SIZE);
    open_sides(sides);
}

static void free_sides(struct sides *sides)
{
    free(sides->first);
    free(sides->first_flushed);
    free(sides->second);
    free(sides->second_flushed);
    forget();
}

static void wait_in_sync(struct sides *sides)
{
    while (!figure(sides->mirror, "in_sync"))
        turn(&loop);
    CHECK(figure(sides->mirror, "stale_regions") == 0);
    CHECK(!memcmp(sides->first, sides->second, SIZE));
}

static void it_copies_and_follows(void)
{
    struct sides sides;
    uint8_t *model = pattern(SIZE, 1);
    unsigned seed = 5;

    new_sides(&sides);
    CHECK(figure(sides.mirror, "stale_regions") == SIZE / (64 * KIB));
    for (int i = 0; i < 20; i++) /* while it copies */
        random_batch(sides.disk, model, SIZE, &seed);
    wait_in_sync(&sides);
    for (int i = 0; i < 20; i++)
        random_batch(sides.disk, model, SIZE, &seed);
    CHECK(!memcmp(sides.first, sides.second, SIZE) && !memcmp(sides.first, model, SIZE));
    close_sides(&sides);
    free(model);
    free_sides(&sides);
}

static void the_target_is_lost_and_back(void)
{
    struct sides sides;
    uint8_t *model = pattern(SIZE, 1);
    unsigned seed = 5;
    uint64_t copied;

    new_sides(&sides);
    wait_in_sync(&sides);
    CHECK(!disk_do(sides.disk, PV_IO_FLUSH, 0, NULL, 0, 0));
    copied = figure(sides.mirror, "resynced_regions");
    attach(sides.target, "error", "types=all");
    CHECK(!disk_write(sides.disk, 0, model, 4096)); /* the guest hears nothing of it */
    CHECK(figure(sides.mirror, "target_lost") == 1 && figure(sides.mirror, "times_lost") == 1);
    CHECK(!disk_write(sides.disk, MIB, model, 128 * KIB) && !disk_do(sides.disk, PV_IO_FLUSH, 0, NULL, 0, 0));
    memcpy(model + MIB, model, 128 * KIB);
    CHECK(figure(sides.mirror, "stale_regions") == 3);
    while (figure(sides.mirror, "target_errors") < 3) /* it tries again */
        turn(&loop);
    detach(sides.target, 0);
    wait_in_sync(&sides);
    CHECK(figure(sides.mirror, "resynced_regions") == copied + 3); /* no more than it must */
    attach(sides.target, "error", "types=write probability=0.2 seed=7");
    for (int i = 0; i < 20; i++)
        random_batch(sides.disk, model, SIZE, &seed);
    detach(sides.target, 0);
    wait_in_sync(&sides);
    CHECK(!memcmp(sides.first, model, SIZE));
    close_sides(&sides);
    free(model);
    free_sides(&sides);
}

/* A target that does not answer: the guest goes on without it. What was sent to it arrives later than newer data, and does not stay. */
static void a_silent_target_is_given_up(void)
{
    struct sides sides;
    uint8_t data[8192];
    struct pv_filter *filter;

    new_sides(&sides);
    wait_in_sync(&sides);
    filter = attach(sides.target, "delay", "us=3600000000 types=write,flush");
    memset(data, 9, sizeof data);
    CHECK(!disk_write(sides.disk, 0, data, 4096) && figure(sides.mirror, "target_lost") == 1);
    CHECK(!disk_do(sides.disk, PV_IO_FLUSH, 0, NULL, 0, 0));
    memset(data, 10, sizeof data);
    CHECK(!disk_write(sides.disk, 0, data, 4096)); /* newer, and not sent */
    for (int i = 0; i < 20; i++)
        turn(&loop);
    CHECK(figure(sides.mirror, "in_sync") == 0 && figure(filter, "delayed") == 1 && memcmp(sides.first, sides.second, SIZE));
    disk_quiesce(sides.target); /* it answers: the older data arrives */
    pv_instance_resume(sides.target);
    detach(sides.target, 0);
    wait_in_sync(&sides);
    CHECK(sides.second[0] == 10);
    close_sides(&sides);
    free_sides(&sides);
}

/* What a kill leaves: the map as it is, one side with a write, the other without. */
static void a_kill_leaves_what_differs_dirty(void)
{
    struct sides sides, after;
    uint8_t data[4096], *seen = malloc(SIZE);
    char command[400];
    struct call call;

    new_sides(&sides);
    wait_in_sync(&sides);
    CHECK(!disk_do(sides.disk, PV_IO_FLUSH, 0, NULL, 0, 0));
    memset(data, 9, sizeof data);
    attach(sides.target, "delay", "us=3600000000 types=write");
    call_start(&call, sides.disk, PV_IO_WRITE, 2 * MIB, data, 4096, 0);
    turn(&loop);
    CHECK(!call.over && memcmp(sides.first, sides.second, SIZE));
    snprintf(command, sizeof command, "cp --sparse=always %s %s.k && cp --sparse=always %s %s.k.live", state, state, live, state);
    CHECK(!system(command));
    memcpy(seen, sides.second, SIZE);
    disk_quiesce(sides.target);
    pv_instance_resume(sides.target);
    CHECK(!call_wait(&call, &loop));
    close_sides(&sides);
    memcpy(sides.second, seen, SIZE); /* it never came there */
    snprintf(command, sizeof command, "mv %s.k %s && mv %s.k.live %s", state, state, state, live);
    CHECK(!system(command));
    after = sides;
    open_sides(&after);
    CHECK(figure(after.mirror, "stale_regions") == 1);
    wait_in_sync(&after);
    close_sides(&after);
    free(seen);
    free_sides(&sides);
}

static void a_clean_close_copies_nothing_a_power_cut_all(void)
{
    struct sides sides;
    uint8_t data[4096] = {1};
    unsigned seed = 1;

    pv_boot_id_for_tests = "one";
    new_sides(&sides);
    wait_in_sync(&sides);
    CHECK(!disk_write(sides.disk, 0, data, 4096) && !disk_do(sides.disk, PV_IO_FLUSH, 0, NULL, 0, 0));
    close_sides(&sides);
    CHECK(access(live, F_OK));
    pv_boot_id_for_tests = "two";
    open_sides(&sides);
    CHECK(figure(sides.mirror, "stale_regions") == 0);
    CHECK(!disk_write(sides.disk, 0, data, 4096));
    pv_instance_withdraw(sides.target);
    pv_boot_id_for_tests = "three";
    close_sides(&sides);
    crashy_power_cut(sides.first, sides.first_flushed, SIZE, &seed);
    crashy_power_cut(sides.second, sides.second_flushed, SIZE, &seed);
    open_sides(&sides);
    wait_in_sync(&sides);
    close_sides(&sides);
    pv_boot_id_for_tests = NULL;
    free_sides(&sides);
}

static int stop;

static void *scribble(void *argument)
{
    for (uint8_t i = 0; !__atomic_load_n(&stop, __ATOMIC_RELAXED); i++)
        memset(argument, i, 64 * KIB);
    return NULL;
}

/* A guest that changes its memory while it is written: whatever is stored, it is the same on both sides. */
static void a_hostile_guest_cannot_make_them_differ(void)
{
    struct sides sides;
    uint8_t *memory = malloc(64 * KIB);
    pthread_t thread;

    new_sides(&sides);
    wait_in_sync(&sides);
    CHECK(!pthread_create(&thread, NULL, scribble, memory));
    for (uint64_t i = 0; i < 500; i++)
        CHECK(!disk_write(sides.disk, i % 64 * 64 * KIB, memory, 64 * KIB));
    __atomic_store_n(&stop, 1, __ATOMIC_RELAXED);
    CHECK(!pthread_join(thread, NULL));
    CHECK(!memcmp(sides.first, sides.second, SIZE));
    close_sides(&sides);
    free(memory);
    free_sides(&sides);
}

static void bad_settings_are_refused(void)
{
    struct pv_instance *disk = memory_disk("d", SIZE, &loop), *small = memory_disk("small", MIB, &loop);
    struct pv_fail fail;
    char text[200];

    CHECK(!pv_instance_publish(small, &fail));
    create("mirror", settings, SIZE);
    refused(disk, "mirror", settings, "no disk second");
    refused(disk, "mirror", "target=disk:second", "state is not set");
    refused(disk, "mirror", "state=/x", "target is not set");
    snprintf(text, sizeof text, "target=disk:small state=%s", state);
    refused(disk, "mirror", text, "at least 4194304");
    pv_instance_withdraw(small);
    disk_close(small);
    disk_close(disk);
    forget();
}

int main(void)
{
    int err;

    CHECK(mkdtemp(folder) && !pv_loop_open(&loop, 0, &err));
    snprintf(state, sizeof state, "%s/dirty", folder);
    snprintf(live, sizeof live, "%s/dirty.live", folder);
    snprintf(settings, sizeof settings, "target=disk:second state=%s retry_ms=20 patience_ms=300", state);
    it_copies_and_follows();
    the_target_is_lost_and_back();
    a_silent_target_is_given_up();
    a_kill_leaves_what_differs_dirty();
    a_clean_close_copies_nothing_a_power_cut_all();
    a_hostile_guest_cannot_make_them_differ();
    bad_settings_are_refused();
    pv_loop_close(&loop);
    CHECK(!rmdir(folder));
    return 0;
}
