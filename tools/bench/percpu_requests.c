/* Where requests of the I/O filters' own come from: linked clones of one base, each of whose reads needs one (csrc/iofilter/target.c).
 *
 *     percpu_requests ROUNDS FOLDER            lines "case value": nanoseconds a read, CLONES clones in turns; bytes that stay behind
 *     percpu_requests count CASE READS FOLDER  for callgrind
 *
 * Cases: each disk's own free list, as shipped; a per-CPU request cache for all; malloc. The linker puts this file's functions before the
 * shipped ones. callgrind knows no rseq: see percpu_users.c. */
#include "iofilter/rooms.h"
#include "model.h"
#include "percpu/magazine.h"

enum { CLONES = 32, DEPTH = 32, READS = 40000, CAPACITY = 128 };
#define SIZE (16 * MIB)
static const char *const CASES[] = {"list", "cache", "malloc"};
static enum { LIST, CACHE, MALLOC, CASE_COUNT } from;

static struct pv_loop loop;
static struct pv_instance *clones[CLONES];
static struct pv_magazine magazine;

struct pv_child *__real_pv_take_child(struct pv_instance *instance);
struct pv_child *__wrap_pv_take_child(struct pv_instance *instance);
struct pv_child *__wrap_pv_take_child(struct pv_instance *instance)
{
    struct pv_child *child;

    if (from == LIST)
        return __real_pv_take_child(instance);
    child = from == CACHE ? pv_magazine_alloc(&magazine) : malloc(sizeof *child);
    CHECK(child);
    memset(&child->io, 0, offsetof(struct pv_io, frames));
    memset(child->io.private, 0, sizeof child->io.private);
    return child;
}

void __real_pv_give_child(struct pv_instance *instance, struct pv_child *child);
void __wrap_pv_give_child(struct pv_instance *instance, struct pv_child *child);
void __wrap_pv_give_child(struct pv_instance *instance, struct pv_child *child)
{
    if (from == LIST)
        __real_pv_give_child(instance, child);
    else if (from == CACHE)
        pv_magazine_free(&magazine, child);
    else
        free(child);
}

static struct pv_instance *open_clone(const char *folder, int number)
{
    char settings[700], state[600], name[32];
    struct pv_fail fail;
    struct pv_instance *clone;

    snprintf(name, sizeof name, "clone-%d", number);
    snprintf(state, sizeof state, "%s/%s", folder, name);
    unlink(state);
    snprintf(settings, sizeof settings, "base=disk:base state=%s", state);
    create("linkedclone", settings, SIZE);
    clone = disk_on(name, pv_data_memory(SIZE, &fail), &loop);
    CHECK(try_attach(clone, "linkedclone", name, settings, &fail));
    return clone;
}

/* Reads of DEPTH requests at once, from one clone after the other. */
static double reads(unsigned count)
{
    static struct call calls[DEPTH];
    static uint8_t data[DEPTH][4096];
    uint64_t start = pv_loop_clock_ns();
    unsigned seed = 1;

    for (unsigned sent = 0; sent < count; sent += DEPTH) {
        struct pv_instance *clone = clones[sent / DEPTH % CLONES];

        for (unsigned i = 0; i < DEPTH; i++)
            call_start(&calls[i], clone, PV_IO_READ, (uint64_t)rand_r(&seed) % (SIZE / 4096) * 4096, data[i], 4096, 0);
        for (unsigned i = 0; i < DEPTH; i++)
            CHECK(!call_wait(&calls[i], &loop));
    }
    return (double)(pv_loop_clock_ns() - start) / count;
}

static uint64_t bytes_behind(void)
{
    uint64_t spares = 0;

    for (int i = 0; i < CLONES; i++)
        spares += clones[i]->spares;
    return from == LIST ? spares * sizeof(struct pv_child) : from == CACHE ? magazine.total * magazine.bytes : 0;
}

static void set_up(const char *folder)
{
    struct pv_percpu *areas;
    struct pv_fail fail;
    struct pv_instance *base;
    int err;

    CHECK(!pv_loop_open(&loop, 0, &err) && !pv_percpu_create(0, &areas, &err));
    CHECK(!pv_magazine_init(&magazine, areas, sizeof(struct pv_child), CAPACITY, 0, &err));
    base = disk_on("base", pv_data_memory(SIZE, &fail), &loop);
    CHECK(!pv_instance_publish(base, &fail));
    for (int i = 0; i < CLONES; i++)
        clones[i] = open_clone(folder, i);
}

static int count_one(const char *name, unsigned operations)
{
    *(uint32_t *)((char *)__builtin_thread_pointer() + pv_rseq_offset + PV_RSEQ_CPU_ID) = 0;
    for (from = 0; from < CASE_COUNT && strcmp(CASES[from], name);)
        from++;
    CHECK(from < CASE_COUNT);
    reads(operations);
    return 0;
}

int main(int argc, char **argv)
{
    if (argc < 3)
        return 2;
    set_up(argv[argc - 1]);
    if (!strcmp(argv[1], "count"))
        return argc == 5 ? count_one(argv[2], (unsigned)atoi(argv[3])) : 2;
    for (int round = 0; round < atoi(argv[1]); round++)
        for (from = 0; from < CASE_COUNT; from++) {
            reads(READS / 10);
            printf("%s %.2f\n", CASES[from], reads(READS));
            printf("%s_bytes %llu\n", CASES[from], (unsigned long long)bytes_behind());
        }
    return 0;
}
