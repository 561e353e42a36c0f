/* Chains of filters against a plain array: the fuzzer chooses filters, their order and settings, requests, and when a filter comes, goes or the
 * disk is closed and opened again. What is read must be what the array says. Base and other side are looked at in the end. */
#include <fcntl.h>
#include <sys/stat.h>

#include "model.h"
#include "iofilter/filters/common/map.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define SIZE (256 * KIB)
#define CALLS 8

struct input {
    const uint8_t *at, *end;
};

struct running {
    struct call call;
    uint8_t *data;
    bool used;
};

struct world {
    struct pv_loop loop;
    struct pv_instance *base, *target, *disk;
    uint8_t *bytes, *model; /* the disk's data outlives the instance: a file */
    int data_fd;
    char folder[40], stateful[4][400];
    unsigned count;
    struct running calls[CALLS];
};

static const char *const transient[] = {"null", "stats", "trace", "template", "delay", "throttle"};
static const char *const transient_settings[] = {"", "", "records=16", "stride=4K", "us=10 jitter_us=50 types=all", "iops=1M bytes=1G"};

static uint8_t next(struct input *input)
{
    return input->at < input->end ? *input->at++ : 0;
}

static void settings_for(const struct world *world, const char *filter, uint8_t choice, char *out, size_t size)
{
    const char *folder = world->folder, *cluster = (const char *[]){"4K", "16K", "64K"}[choice % 3];

    if (!strcmp(filter, "linkedclone"))
        snprintf(out, size, "base=disk:base state=%s/clone cluster=%s", folder, cluster);
    else if (!strcmp(filter, "snapshot"))
        snprintf(out, size, "delta=file:%s/delta state=%s/snapshot cluster=%s", folder, folder, cluster);
    else if (!strcmp(filter, "mirror"))
        snprintf(out, size, "target=disk:target state=%s/mirror retry_ms=10", folder);
    else if (!strcmp(filter, "encrypt"))
        snprintf(out, size, "key=%s/key state=%s/encrypt", folder, folder);
    else if (!strcmp(filter, "cache"))
        snprintf(out, size, "file=%s/cache id=x size=64K", folder);
    else
        snprintf(out, size, "state=%s/integrity learn=%s", folder, choice % 2 ? "yes" : "no");
}

static void open_disk(struct world *world)
{
    struct pv_fail fail;

    world->disk = disk_on("disk", pv_data_file(dup(world->data_fd), world->count % 2 ? PV_FILE_QUEUED : 0, &fail), &world->loop);
    for (unsigned i = 0; i < world->count; i++) {
        const char *filter = world->stateful[i];

        attach(world->disk, filter, filter + strlen(filter) + 1);
    }
}

/* Which persistent filters there are, the fuzzer says once; they stand in the order of their classes. */
static void choose_filters(struct world *world, struct input *input)
{
    static const char *const upwards[] = {"mirror", "snapshot", "integrity", "encrypt", "linkedclone", "cache"};
    uint8_t mask = next(input), choice = next(input);

    for (unsigned i = 0; i < 6 && world->count < 4; i++) {
        char *slot = world->stateful[world->count], *settings;

        if (!(mask >> i & 1))
            continue;
        strcpy(slot, upwards[i]);
        settings = slot + strlen(slot) + 1;
        settings_for(world, upwards[i], choice, settings, 300);
        create(upwards[i], settings, SIZE);
        world->count++;
    }
    open_disk(world);
}

static bool uses(const struct world *world, const char *filter)
{
    for (unsigned i = 0; i < world->count; i++)
        if (!strcmp(world->stateful[i], filter))
            return true;
    return false;
}

/* ---- requests ---- */

static void settle(struct world *world, struct running *running)
{
    struct pv_io *io = &running->call.io;

    if (!running->used)
        return;
    CHECK(!call_wait(&running->call, &world->loop));
    if (io->type == PV_IO_READ)
        CHECK(!memcmp(running->data, world->model + io->offset, io->length));
    running->used = false;
    free(running->data);
}

static void settle_all(struct world *world)
{
    for (unsigned i = 0; i < CALLS; i++)
        settle(world, &world->calls[i]);
}

static bool overlaps(const struct world *world, uint64_t at, uint64_t length)
{
    for (unsigned i = 0; i < CALLS; i++) {
        const struct pv_io *io = &world->calls[i].call.io;

        if (world->calls[i].used && io->offset < at + length && at < io->offset + io->length)
            return true;
    }
    return false;
}

/* The model is changed at once: nobody reads the range before the request is over. */
static void request(struct world *world, struct input *input, uint8_t op)
{
    struct running *running = &world->calls[next(input) % CALLS];
    enum pv_io_type type = (enum pv_io_type[]){PV_IO_READ, PV_IO_WRITE, PV_IO_WRITE, PV_IO_FLUSH, PV_IO_WRITE_ZEROES}[op % 5];
    uint64_t at = ((uint64_t)next(input) << 8 | next(input)) % (SIZE / 512) * 512, length = (1 + (uint64_t)next(input)) * 512;
    uint8_t value = next(input);

    settle(world, running);
    if (length > SIZE - at)
        length = SIZE - at;
    if (type == PV_IO_FLUSH)
        at = length = 0;
    if (overlaps(world, at, length))
        settle_all(world);
    running->data = malloc(length + 1);
    for (uint64_t i = 0; i < length; i++)
        running->data[i] = (uint8_t)(value + i / 512 * 3);
    if (type == PV_IO_WRITE)
        memcpy(world->model + at, running->data, length);
    else if (type == PV_IO_WRITE_ZEROES)
        memset(world->model + at, 0, length);
    running->used = true;
    call_start(&running->call, world->disk, type, at, running->data, length, type != PV_IO_READ && type != PV_IO_FLUSH && value & 1 ? PV_IO_FUA : 0);
}

/* ---- the chain while requests are under way ---- */

static void come_or_go(struct world *world, struct input *input)
{
    uint8_t which = next(input) % 6, place = next(input);
    struct pv_instance *disk = world->disk;
    struct settings_text parsed;
    struct pv_fail fail;
    struct pv_filter *filter;

    for (unsigned i = 0; i < disk->count; i++)
        if (!strcmp(disk->filters[i]->name, transient[which])) {
            detach(disk, i);
            return;
        }
    filter = pv_filter_open(disk, transient[which], transient[which], settings_of(&parsed, transient_settings[which]), &fail);
    CHECK(filter);
    disk_quiesce(disk);
    if (pv_instance_insert(disk, filter, place % (disk->count + 1), &fail))
        pv_filter_close(filter);
    pv_instance_resume(disk);
}

static void step(struct world *world, struct input *input)
{
    uint8_t op = next(input);

    if (op < 200) {
        request(world, input, op);
    } else if (op < 225) {
        come_or_go(world, input);
    } else if (op < 240) {
        settle_all(world);
        disk_close(world->disk);
        open_disk(world);
    } else {
        turn(&world->loop);
    }
}

/* ---- life ---- */

static int scratch(const struct world *world, const char *name, uint64_t size)
{
    char path[80];
    int fd;

    snprintf(path, sizeof path, "%s/%s", world->folder, name);
    fd = open(path, O_RDWR | O_CREAT, 0600);
    CHECK(fd >= 0 && !ftruncate(fd, (off_t)size));
    return fd;
}

static void begin(struct world *world)
{
    struct pv_fail fail;
    int err, fd;

    strcpy(world->folder, "/dev/shm/pv-fuzz-XXXXXX");
    CHECK(mkdtemp(world->folder) && !pv_loop_open(&world->loop, 0, &err));
    world->bytes = pattern(SIZE, 1);
    world->model = calloc(1, SIZE);
    world->data_fd = scratch(world, "data", SIZE);
    close(scratch(world, "delta", SIZE));
    fd = scratch(world, "key", 0);
    CHECK(write(fd, world->bytes, 64) == 64 && !close(fd));
    world->base = memory_disk("base", SIZE, &world->loop);
    world->target = memory_disk("target", SIZE, &world->loop);
    CHECK(!disk_write(world->base, 0, world->bytes, SIZE));
    CHECK(!pv_instance_publish(world->base, &fail) && !pv_instance_publish(world->target, &fail));
}

static void remove_folder(const struct world *world)
{
    static const char *const names[] = {"data", "delta", "key", "clone", "clone.live", "snapshot", "snapshot.live", "mirror", "mirror.live",
        "encrypt", "integrity", "integrity.live", "cache"};
    char path[80];

    for (unsigned i = 0; i < sizeof names / sizeof *names; i++) {
        snprintf(path, sizeof path, "%s/%s", world->folder, names[i]);
        unlink(path);
    }
    CHECK(!rmdir(world->folder));
}

static void finish(struct world *world)
{

    settle_all(world);
    check_all(world->disk, world->model, SIZE);
    disk_close(world->disk);
    check_all(world->base, world->bytes, SIZE); /* nobody writes to a base */
    pv_instance_withdraw(world->base);
    pv_instance_withdraw(world->target);
    disk_close(world->base);
    disk_close(world->target);
    pv_loop_close(&world->loop);
    close(world->data_fd);
    free(world->bytes);
    free(world->model);
    remove_folder(world);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct world world;
    struct input input = {data, data + size};

    memset(&world, 0, sizeof world);
    begin(&world);
    choose_filters(&world, &input);
    if (uses(&world, "linkedclone"))
        memcpy(world.model, world.bytes, SIZE);
    for (unsigned i = 0; i < 300 && input.at < input.end; i++)
        step(&world, &input);
    finish(&world);
    return 0;
}
