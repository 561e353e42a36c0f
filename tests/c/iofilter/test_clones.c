/* A thousand clones of one base: made in seconds, and next to nothing each while nobody uses them. */
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include "model.h"

#define CLONES 1000
#define SIZE (2048 * MIB)
#define LIMIT_BYTES (64 * KIB)

static struct pv_loop loop;
static char folder[] = "/tmp/pv-clones-XXXXXX";
static struct pv_instance *clones[CLONES];

static char *path_of(const char *kind, unsigned i)
{
    static char path[100];

    snprintf(path, sizeof path, "%s/%s%u", folder, kind, i);
    return path;
}

/* Memory that only this process has, and what its mappings hold: bytes. */
static uint64_t used(void)
{
    FILE *file = fopen("/proc/self/smaps_rollup", "r");
    uint64_t sum = 0;
    char line[200];

    CHECK(file);
    while (fgets(line, sizeof line, file)) {
        unsigned long long kib;

        if (sscanf(line, "Pss: %llu kB", &kib) == 1)
            sum = kib * KIB;
    }
    fclose(file);
    return sum;
}

static void make_one(unsigned i)
{
    char settings[200];
    int fd = open(path_of("data", i), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);

    CHECK(fd >= 0 && !ftruncate(fd, SIZE) && !close(fd));
    snprintf(settings, sizeof settings, "base=disk:base state=%s", path_of("state", i));
    create("linkedclone", settings, SIZE);
}

static void open_one(unsigned i)
{
    struct pv_fail fail;
    char settings[200], name[20];

    snprintf(name, sizeof name, "clone%u", i);
    snprintf(settings, sizeof settings, "base=disk:base state=%s", path_of("state", i));
    clones[i] = disk_on(name, pv_data_file(open(path_of("data", i), O_RDWR | O_CLOEXEC), 0, &fail), &loop);
    attach(clones[i], "linkedclone", settings);
}

static void remove_one(unsigned i)
{
    disk_close(clones[i]);
    unlink(path_of("data", i));
    unlink(path_of("state", i));
}

static double seconds_of(void (*each)(unsigned))
{
    uint64_t start = pv_loop_clock_ns();

    for (unsigned i = 0; i < CLONES; i++)
        each(i);
    return (double)(pv_loop_clock_ns() - start) / 1e9;
}

int main(void)
{
    struct rlimit files = {8192, 8192};
    struct pv_instance *base;
    struct pv_fail fail;
    uint8_t block[4096], seen[4096];
    uint64_t before, each;
    double made, opened;
    int err;

    if (setrlimit(RLIMIT_NOFILE, &files)) {
        printf("skipped: %d open files are not allowed here\n", 8192);
        return 0;
    }
    CHECK(mkdtemp(folder) && !pv_loop_open(&loop, 0, &err));
    base = memory_disk("base", SIZE, &loop);
    CHECK(!pv_instance_publish(base, &fail));
    memset(block, 5, sizeof block);
    CHECK(!disk_write(base, 0, block, sizeof block));
    made = seconds_of(make_one);
    before = used();
    opened = seconds_of(open_one);
    each = (used() - before) / CLONES;
    memset(block, 6, sizeof block);
    for (unsigned i = 0; i < CLONES; i++) {
        CHECK(!disk_read(clones[i], 0, seen, 4096) && seen[0] == 5);
        if (i % 2)
            CHECK(!disk_write(clones[i], 0, block, 4096));
    }
    for (unsigned i = 0; i < CLONES; i++)
        CHECK(!disk_read(clones[i], 0, seen, 4096) && seen[0] == (i % 2 ? 6 : 5));
    printf("%d clones of %llu MiB: made in %.2f s, opened in %.2f s, %llu bytes each while idle\n", CLONES,
        (unsigned long long)(SIZE / MIB), made, opened, (unsigned long long)each);
#ifndef __SANITIZE_ADDRESS__ /* its redzones would be counted */
    CHECK(each <= LIMIT_BYTES);
#endif
    seconds_of(remove_one);
    pv_instance_withdraw(base);
    disk_close(base);
    pv_loop_close(&loop);
    for (unsigned i = 0; i < CLONES; i++) {
        char live[120];

        snprintf(live, sizeof live, "%s.live", path_of("state", i));
        unlink(live);
    }
    CHECK(!rmdir(folder));
    return 0;
}
