/* A process writes through a chain of filters and says what was acknowledged; it is killed at a random moment; the disk is opened again and
 * every sector is looked at.
 *
 *     crash-checker CHAIN KILLS FOLDER [SEED]
 *
 * Theory of operation: the log is memory that writer, killer and checker share, two versions a sector: `started` (stored before a request that
 * writes the sector is submitted) and `acked` (stored when it has ended). The writer never has two requests on one sector. So after a kill a
 * sector must be, from its first byte to its last, one of those two versions: another one means that something acknowledged was lost or that
 * something never written came up; a mixture means that it is torn. A version's bytes follow from it and from the sector's number; versions of
 * write-zeroes are all zero; version 0 is what was there at first.
 *
 * Kills meet everything: opening, requests of all kinds, flushes, closing. Prints one line, exits 0; the first bad sector aborts.
 */
#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "model.h"

#define SIZE (8 * MIB)
#define SECTORS (SIZE / 512)
#define DEPTH 16
#define ZEROES 0x80000000u /* a version of write-zeroes */

struct log {
    uint32_t started[SECTORS], acked[SECTORS];
    uint64_t requests, opens, closes;
};

static struct log *journal;
static struct pv_loop loop;
static char folder[100], chain[100];

/* ---- what a version looks like ---- */

static void expected(uint8_t out[512], uint64_t sector, uint32_t version, bool based)
{
    if (version & ZEROES || (!version && !based)) {
        memset(out, 0, 512);
        return;
    }
    for (unsigned i = 0; i < 512; i += 16) {
        uint64_t words[2] = {sector * 0x9e3779b97f4a7c15u + version, ((uint64_t)version << 32) + sector + i};

        memcpy(out + i, words, 16);
    }
}

/* ---- the chain ---- */

static bool has(const char *filter)
{
    return strstr(chain, filter) != NULL;
}

static char *path_of(const char *name)
{
    static char paths[8][200];
    static unsigned next;
    char *path = paths[next++ % 8];

    snprintf(path, sizeof paths[0], "%s/%s", folder, name);
    return path;
}

static int settings_for(const char *filter, char *out, size_t size)
{
    if (!strcmp(filter, "linkedclone"))
        return snprintf(out, size, "base=file:%s state=%s", path_of("base"), path_of("clone.state"));
    if (!strcmp(filter, "snapshot"))
        return snprintf(out, size, "delta=file:%s state=%s cluster=16K", path_of("delta"), path_of("snapshot.state"));
    if (!strcmp(filter, "mirror"))
        return snprintf(out, size, "target=file:%s state=%s", path_of("second"), path_of("mirror.state"));
    if (!strcmp(filter, "encrypt"))
        return snprintf(out, size, "key=%s state=%s", path_of("key"), path_of("encrypt.state"));
    CHECK(!strcmp(filter, "integrity"));
    return snprintf(out, size, "state=%s", path_of("integrity.state"));
}

/* Calls `use` with each filter of the chain, the one nearest to the data first. */
static void each_filter(void (*use)(const char *filter, const char *settings, void *context), void *context)
{
    char names[100], settings[700], *save = NULL, *list[8];
    unsigned count = 0;

    strcpy(names, chain);
    for (char *name = strtok_r(names, "+", &save); name; name = strtok_r(NULL, "+", &save))
        list[count++] = name;
    while (count--) {
        settings_for(list[count], settings, sizeof settings);
        use(list[count], settings, context);
    }
}

static void make_file(const char *name, bool patterned, mode_t mode)
{
    int fd = open(path_of(name), O_RDWR | O_CREAT | O_TRUNC, mode);
    uint8_t sector[512];

    CHECK(fd >= 0 && !ftruncate(fd, SIZE));
    for (uint64_t i = 0; patterned && i < SECTORS; i++) {
        expected(sector, i, 0, true);
        CHECK(pwrite(fd, sector, 512, (off_t)(i * 512)) == 512);
    }
    close(fd);
}

static void create_one(const char *filter, const char *settings, void *context)
{
    (void)context;
    create(filter, settings, SIZE);
}

static void create_all(void)
{
    int fd = open(path_of("key"), O_WRONLY | O_CREAT | O_TRUNC, 0600);

    for (unsigned i = 0; i < 64; i++)
        CHECK(write(fd, &(char){(char)(i * 5 + 3)}, 1) == 1);
    close(fd);
    make_file("base", true, 0600);
    make_file("delta", false, 0600);
    make_file("second", false, 0600);
    make_file("data", has("snapshot") && !has("encrypt"), 0600);
    each_filter(create_one, NULL);
}

static bool is_based(void)
{
    return has("linkedclone") || (has("snapshot") && !has("encrypt"));
}

static void attach_one(const char *filter, const char *settings, void *disk)
{
    attach(disk, filter, settings);
}

/* `slow`: writes lie for some time between the last filter and the file, so that a kill meets what was sent and is not there. */
static struct pv_instance *open_chain(bool slow)
{
    struct pv_fail fail;
    int err, fd = open(path_of("data"), O_RDWR | O_CLOEXEC);
    struct pv_instance *disk;

    CHECK(fd >= 0 && !pv_loop_open(&loop, 0, &err));
    disk = disk_on("d", pv_data_file(fd, 0, &fail), &loop);
    if (slow)
        attach(disk, "delay", "us=0 jitter_us=2000 types=write,zeroes");
    each_filter(attach_one, disk);
    return disk;
}

/* ---- the writer ---- */

struct slot {
    struct call call;
    uint64_t first, count; /* sectors */
    uint8_t *data;
    bool busy;
};

static bool is_busy(const struct slot *slots, uint64_t first, uint64_t count)
{
    for (unsigned i = 0; i < DEPTH; i++)
        if (slots[i].busy && slots[i].first < first + count && first < slots[i].first + slots[i].count)
            return true;
    return false;
}

static void finish(struct slot *slot)
{
    CHECK(!slot->call.io.error);
    for (uint64_t i = slot->first; i < slot->first + slot->count; i++)
        __atomic_store_n(&journal->acked[i], journal->started[i], __ATOMIC_RELEASE);
    slot->busy = false;
    journal->requests++;
}

static void start(struct pv_instance *disk, struct slot *slots, struct slot *slot, unsigned *seed, uint32_t version)
{
    unsigned kind = (unsigned)rand_r(seed) % 100;
    enum pv_io_type type = kind < 80 ? PV_IO_WRITE : kind < 88 ? PV_IO_WRITE_ZEROES : PV_IO_FLUSH;

    slot->count = 1 + (uint64_t)rand_r(seed) % (rand_r(seed) % 4 ? 16 : 300);
    if (rand_r(seed) % 2)
        slot->count = (slot->count + 7) / 8 * 8;
    slot->first = (uint64_t)rand_r(seed) % (SECTORS - slot->count);
    if (slot->count % 8 == 0)
        slot->first &= ~7ull;
    if (type == PV_IO_FLUSH)
        slot->first = slot->count = 0;
    else if (is_busy(slots, slot->first, slot->count))
        return;
    if (type == PV_IO_WRITE_ZEROES)
        version |= ZEROES;
    for (uint64_t i = 0; i < slot->count; i++) {
        expected(slot->data + i * 512, slot->first + i, version, true);
        __atomic_store_n(&journal->started[slot->first + i], version, __ATOMIC_RELEASE);
    }
    slot->busy = true;
    call_start(&slot->call, disk, type, slot->first * 512, slot->data, slot->count * 512,
        type != PV_IO_FLUSH && kind % 10 == 0 ? PV_IO_FUA : 0);
}

static void run_some(struct pv_instance *disk, struct slot *slots, unsigned *seed, uint32_t *version)
{
    unsigned left = 50 + (unsigned)rand_r(seed) % 400, busy = 1;

    while (left || busy) {
        busy = 0;
        for (unsigned i = 0; i < DEPTH; i++) {
            if (slots[i].busy && slots[i].call.over)
                finish(&slots[i]);
            if (!slots[i].busy && left) {
                left--;
                start(disk, slots, &slots[i], seed, ++*version);
            }
            busy += slots[i].busy;
        }
        if (busy)
            turn(&loop);
    }
}

/* For ever: open, write, close. */
static void write_for_ever(unsigned seed, uint32_t version)
{
    static struct slot slots[DEPTH];

    for (unsigned i = 0; i < DEPTH; i++)
        CHECK(slots[i].data = malloc(300 * 512 + 4096));
    for (;;) {
        struct pv_instance *disk = open_chain(version >> 16 & 1);

        journal->opens++;
        run_some(disk, slots, &seed, &version);
        disk_close(disk);
        pv_loop_close(&loop);
        journal->closes++;
    }
}

/* ---- the checker ---- */

static void check_sector(uint64_t sector, const uint8_t *seen)
{
    uint8_t want[512], other[512];

    expected(want, sector, journal->acked[sector], is_based());
    if (!memcmp(seen, want, 512)) {
        journal->started[sector] = journal->acked[sector];
        return;
    }
    expected(other, sector, journal->started[sector], is_based());
    if (!memcmp(seen, other, 512)) {
        journal->acked[sector] = journal->started[sector];
        return;
    }
    fprintf(stderr, "%s: sector %llu is neither version %x, which was acknowledged, nor %x, which was started\n", chain,
        (unsigned long long)sector, journal->acked[sector], journal->started[sector]);
    for (unsigned i = 0; i < 512; i += 128)
        fprintf(stderr, "  byte %3u: %02x%02x%02x%02x, acknowledged %02x%02x%02x%02x\n", i, seen[i], seen[i + 1], seen[i + 2], seen[i + 3],
            want[i], want[i + 1], want[i + 2], want[i + 3]);
    abort();
}

static void compare_files(const char *a, const char *b)
{
    static uint8_t one[64 * KIB], two[64 * KIB];
    int x = open(path_of(a), O_RDONLY), y = open(path_of(b), O_RDONLY);

    for (uint64_t at = 0; at < SIZE; at += sizeof one)
        CHECK(pread(x, one, sizeof one, (off_t)at) == sizeof one && pread(y, two, sizeof two, (off_t)at) == sizeof two &&
              !memcmp(one, two, sizeof one));
    close(x);
    close(y);
}

/* What the chain's filters promise beside the data itself. */
static void check_sides(struct pv_instance *disk)
{
    struct pv_filter *last = disk->filters[disk->count - 1];

    for (unsigned i = 0; i < disk->count; i++)
        if (!strcmp(disk->filters[i]->class->name, "integrity"))
            CHECK(figure(disk->filters[i], "bad_blocks") == 0 && figure(disk->filters[i], "relearned_blocks") == 0);
    if (has("mirror") && !strcmp(last->class->name, "mirror")) {
        while (!figure(last, "in_sync"))
            turn(&loop);
        compare_files("data", "second");
    }
    if (has("snapshot") && !has("encrypt"))
        compare_files("data", "base"); /* the disk as it was */
}

static void check_disk(void)
{
    static uint8_t seen[SIZE];
    struct pv_instance *disk = open_chain(false);

    CHECK(!disk_read(disk, 0, seen, SIZE));
    for (uint64_t sector = 0; sector < SECTORS; sector++)
        check_sector(sector, seen + sector * 512);
    check_sides(disk);
    disk_close(disk);
    pv_loop_close(&loop);
}

/* ---- the killer ---- */

static int run_child(void (*work)(void))
{
    pid_t pid = fork();
    int status;

    CHECK(pid >= 0);
    if (!pid) {
        work();
        _exit(0);
    }
    CHECK(waitpid(pid, &status, 0) == pid);
    return status;
}

static void kill_once(unsigned round, unsigned *seed)
{
    pid_t pid = fork();
    int status;

    CHECK(pid >= 0);
    if (!pid)
        write_for_ever((unsigned)rand_r(seed) + round, round << 16);
    usleep((useconds_t)rand_r(seed) % (rand_r(seed) % 3 ? 60000 : 8000));
    kill(pid, SIGKILL);
    CHECK(waitpid(pid, &status, 0) == pid);
    if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGKILL) {
        fprintf(stderr, "%s: the writer ended by itself, status %d\n", chain, status);
        abort();
    }
    if (run_child(check_disk)) {
        fprintf(stderr, "%s: bad after kill %u\n", chain, round);
        abort();
    }
}

int main(int argc, char **argv)
{
    unsigned kills, seed;

    if (argc < 4 || strlen(argv[1]) >= sizeof chain || strlen(argv[3]) >= sizeof folder) {
        fprintf(stderr, "usage: %s CHAIN KILLS FOLDER [SEED]\n", argv[0]);
        return 2;
    }
    strcpy(chain, argv[1]);
    strcpy(folder, argv[3]);
    kills = (unsigned)atoi(argv[2]);
    seed = argc > 4 ? (unsigned)atoi(argv[4]) : 1;
    journal = mmap(NULL, sizeof *journal, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(journal != MAP_FAILED);
    create_all();
    for (unsigned round = 1; round <= kills; round++)
        kill_once(round, &seed);
    printf("%s: %u kills, %llu requests acknowledged, %llu opens, %llu closes: nothing lost, nothing torn\n", chain, kills,
        (unsigned long long)journal->requests, (unsigned long long)journal->opens, (unsigned long long)journal->closes);
    return 0;
}
