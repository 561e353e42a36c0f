/* What filters cost, in one process, without a front end.
 *
 *     filters ROUNDS FOLDER             every case in turn, ROUNDS times: lines "case value"
 *     filters count FILTER N REQUESTS   for callgrind: REQUESTS reads through N of that filter over memory
 */
#include <fcntl.h>
#include <openssl/evp.h>
#include <sys/stat.h>

#include "model.h"

#define DEPTH 32
#define SIZE (64 * MIB)
#define CHUNK MIB

static struct pv_loop loop;
static const char *folder;

static char *path_of(const char *name)
{
    static char paths[4][300];
    static unsigned next;
    char *path = paths[next++ % 4];

    snprintf(path, sizeof paths[0], "%s/%s", folder, name);
    return path;
}

static void add_named(struct pv_instance *disk, const char *class, unsigned index, const char *settings)
{
    struct pv_fail fail;
    char name[32];

    snprintf(name, sizeof name, "%s%u", class, index);
    CHECK(try_attach(disk, class, name, settings, &fail));
}

static struct pv_instance *file_disk(const char *name, const char *file)
{
    struct pv_fail fail;
    int fd = open(path_of(file), O_RDWR | O_CREAT | O_CLOEXEC, 0600);

    CHECK(fd >= 0 && !ftruncate(fd, SIZE));
    return disk_on(name, pv_data_file(fd, 0, &fail), &loop);
}

/* ---- random reads, DEPTH at a time ---- */

static uint64_t reads_of(struct pv_instance *disk, unsigned requests)
{
    static struct call calls[DEPTH];
    static uint8_t data[DEPTH][4096];
    unsigned seed = 1, sent = 0, over = 0;
    uint64_t start = pv_loop_clock_ns();

    while (over < requests) {
        bool waits = true;

        for (unsigned i = 0; i < DEPTH; i++) {
            if (sent >= DEPTH && !calls[i].over)
                continue;
            if (sent >= DEPTH)
                over++;
            calls[i].over = false;
            call_start(&calls[i], disk, PV_IO_READ, (uint64_t)rand_r(&seed) % (SIZE / 4096) * 4096, data[i], 4096, 0);
            sent++;
            waits &= !calls[i].over;
        }
        if (waits) /* none was done at once: a turn would sleep */
            turn(&loop);
    }
    for (unsigned i = 0; i < DEPTH; i++)
        CHECK(!call_wait(&calls[i], &loop));
    return pv_loop_clock_ns() - start;
}

static void say_iops(const char *name, struct pv_instance *disk)
{
    unsigned requests = 100000;

    printf("%s %.0f\n", name, requests / ((double)reads_of(disk, requests) / 1e9));
}

static void pass_through(void)
{
    struct pv_instance *disk = file_disk("d", "data");

    say_iops("iops_0", disk);
    for (unsigned i = 0; i < 8; i++)
        add_named(disk, "null", i, "");
    say_iops("iops_8", disk);
    disk_close(disk);
}

static void redirect(void)
{
    struct pv_instance *base = file_disk("base", "base"), *clone = file_disk("clone", "clone");
    struct pv_fail fail;
    char settings[700];

    unlink(path_of("state"));
    CHECK(!pv_instance_publish(base, &fail));
    snprintf(settings, sizeof settings, "base=disk:base state=%s", path_of("state"));
    create("linkedclone", settings, SIZE);
    say_iops("direct", base);
    add_named(clone, "linkedclone", 0, settings);
    say_iops("redirect", clone);
    disk_close(clone);
    pv_instance_withdraw(base);
    disk_close(base);
    unlink(path_of("state"));
}

/* ---- encrypt: beside reading and AES one after the other ---- */

static uint64_t read_and_decrypt(struct pv_instance *disk, uint8_t *buffer, const uint8_t *key)
{
    EVP_CIPHER_CTX *context = EVP_CIPHER_CTX_new();
    uint8_t tweak[16] = {0};
    uint64_t start = pv_loop_clock_ns();
    int len;

    CHECK(EVP_DecryptInit_ex(context, EVP_aes_256_xts(), NULL, key, tweak) == 1);
    for (uint64_t at = 0; at < SIZE; at += CHUNK) {
        CHECK(!disk_read(disk, at, buffer, CHUNK));
        for (uint64_t i = 0; i < CHUNK; i += 4096) {
            memcpy(tweak, &(uint64_t){(at + i) / 4096}, 8);
            EVP_DecryptInit_ex(context, NULL, NULL, NULL, tweak);
            EVP_DecryptUpdate(context, buffer + i, &len, buffer + i, 4096);
        }
    }
    EVP_CIPHER_CTX_free(context);
    return pv_loop_clock_ns() - start;
}

static uint64_t read_all(struct pv_instance *disk, uint8_t *buffer)
{
    uint64_t start = pv_loop_clock_ns();

    for (uint64_t at = 0; at < SIZE; at += CHUNK)
        CHECK(!disk_read(disk, at, buffer, CHUNK));
    return pv_loop_clock_ns() - start;
}

static void say_speed(const char *name, uint64_t ns)
{
    printf("%s %.0f\n", name, SIZE / 1e6 / ((double)ns / 1e9));
}

static void encrypt(void)
{
    struct pv_instance *disk = file_disk("d", "data");
    uint8_t *buffer = aligned_alloc(4096, CHUNK), key[64];
    char settings[700];
    int fd = open(path_of("key"), O_WRONLY | O_CREAT | O_TRUNC, 0600);

    for (unsigned i = 0; i < 64; i++)
        key[i] = (uint8_t)(i * 3 + 1);
    CHECK(fd >= 0 && write(fd, key, 64) == 64 && !close(fd));
    unlink(path_of("state"));
    snprintf(settings, sizeof settings, "key=%s state=%s", path_of("key"), path_of("state"));
    create("encrypt", settings, SIZE);
    add_named(disk, "encrypt", 0, settings);
    memset(buffer, 5, CHUNK);
    for (uint64_t at = 0; at < SIZE; at += CHUNK) /* holes are not decrypted */
        CHECK(!disk_write(disk, at, buffer, CHUNK));
    read_all(disk, buffer);
    say_speed("encrypt", read_all(disk, buffer));
    detach(disk, 0);
    say_speed("read_and_aes", read_and_decrypt(disk, buffer, key));
    disk_close(disk);
    free(buffer);
    unlink(path_of("state"));
}

/* ---- cache ---- */

static double each_us(struct pv_instance *disk)
{
    uint8_t data[4096];
    uint64_t start = pv_loop_clock_ns();

    for (unsigned i = 0; i < 500; i++)
        CHECK(!disk_read(disk, i * 65536ull, data, 4096));
    return (double)(pv_loop_clock_ns() - start) / 500e3;
}

static void cache(void)
{
    struct pv_instance *disk = file_disk("d", "data");
    char settings[700];

    unlink(path_of("cache"));
    snprintf(settings, sizeof settings, "file=%s id=x size=64M", path_of("cache"));
    add_named(disk, "delay", 0, "us=100 types=read");
    add_named(disk, "cache", 0, settings);
    printf("cache_miss %.2f\n", each_us(disk));
    printf("cache_hit %.2f\n", each_us(disk));
    disk_close(disk);
    unlink(path_of("cache"));
}

static void send_some(struct pv_instance *disk, unsigned requests)
{
    struct call call;
    uint8_t data[512];

    for (unsigned i = 0; i < requests; i++)
        call_start(&call, disk, PV_IO_READ, i % 1000 * 512, data, 512, 0);
}

static void count(const char *class, unsigned filters, unsigned requests)
{
    struct pv_instance *disk = memory_disk("d", SIZE, &loop);

    for (unsigned i = 0; i < filters; i++)
        add_named(disk, class, i, "");
    send_some(disk, requests);
    disk_close(disk);
}

/* Reads of a clone that has nothing of its own: the filter, the way to the base's instance, and back. */
static void count_redirects(unsigned filters, unsigned requests)
{
    struct pv_instance *base = memory_disk("base", SIZE, &loop), *clone = memory_disk("clone", SIZE, &loop);
    struct pv_fail fail;
    char settings[700];

    folder = "/dev/shm";
    unlink(path_of("pv-count"));
    CHECK(!pv_instance_publish(base, &fail));
    snprintf(settings, sizeof settings, "base=disk:base state=%s", path_of("pv-count"));
    create("linkedclone", settings, SIZE);
    if (filters)
        add_named(clone, "linkedclone", 0, settings);
    send_some(clone, requests);
    disk_close(clone);
    pv_instance_withdraw(base);
    disk_close(base);
    unlink(path_of("pv-count"));
}

int main(int argc, char **argv)
{
    int err;

    CHECK(argc >= 3 && !pv_loop_open(&loop, 0, &err));
    if (!strcmp(argv[1], "count")) {
        CHECK(argc == 5);
        if (!strcmp(argv[2], "linkedclone"))
            count_redirects((unsigned)atoi(argv[3]), (unsigned)atoi(argv[4]));
        else
            count(argv[2], (unsigned)atoi(argv[3]), (unsigned)atoi(argv[4]));
        return 0;
    }
    folder = argv[2];
    for (int round = 0; round < atoi(argv[1]); round++) {
        pass_through();
        redirect();
        encrypt();
        cache();
    }
    pv_loop_close(&loop);
    return 0;
}
