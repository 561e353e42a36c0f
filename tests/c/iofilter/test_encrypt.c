/* The filter `encrypt`: what is stored is AES-256-XTS and nothing else, keys are checked, parts of sectors work. */
#include <fcntl.h>
#include <openssl/evp.h>
#include <sys/stat.h>

#include "iofilter/filters/common/bounce.h"
#include "iofilter/filters/common/crc32c.h"
#include "model.h"

#define SIZE (2 * MIB)

static struct pv_loop loop;
static char folder[] = "/tmp/pv-encrypt-XXXXXX";
static char key[64], other[64], state[64], settings[256];

static void write_file(const char *path, const void *bytes, size_t len, mode_t mode)
{
    int fd;

    unlink(path);
    fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, mode);
    CHECK(fd >= 0 && write(fd, bytes, len) == (ssize_t)len && !close(fd));
}

static void forget(void)
{
    unlink(key);
    unlink(other);
    unlink(state);
}

static void new_key(void)
{
    uint8_t bytes[64];

    for (unsigned i = 0; i < 64; i++)
        bytes[i] = (uint8_t)(i * 7 + 1);
    write_file(key, bytes, 64, 0600);
    snprintf(settings, sizeof settings, "key=%s state=%s", key, state);
    create("encrypt", settings, SIZE);
}

/* The raw bytes below the filter. */
static void read_below(struct pv_instance *disk, uint64_t at, uint8_t *out, uint64_t length)
{
    struct call call = {.segment = {out, length}};

    call.io = (struct pv_io){.type = PV_IO_READ, .offset = at, .length = length, .iov = &call.segment, .iov_count = 1, .done = call_done, .owner = &call};
    pv_instance_submit(disk, &call.io, 1);
    CHECK(!call_wait(&call, &loop));
}

static void what_is_stored_is_the_cipher(void)
{
    struct pv_instance *disk = memory_disk("d", SIZE, &loop);
    uint8_t *plain = pattern(4096, 1), stored[4096], expected[4096], bytes[64], tweak[16] = {5}, zero[4096] = {0};
    EVP_CIPHER_CTX *context = EVP_CIPHER_CTX_new();
    int len;

    new_key();
    attach(disk, "encrypt", settings);
    for (unsigned i = 0; i < 64; i++)
        bytes[i] = (uint8_t)(i * 7 + 1);
    CHECK(EVP_EncryptInit_ex(context, EVP_aes_256_xts(), NULL, bytes, tweak) == 1);
    CHECK(EVP_EncryptUpdate(context, expected, &len, plain, 4096) == 1);
    EVP_CIPHER_CTX_free(context);
    CHECK(!disk_write(disk, 5 * 4096, plain, 4096));
    read_below(disk, 5 * 4096, stored, 4096);
    CHECK(!memcmp(stored, expected, 4096));
    CHECK(!disk_write(disk, 6 * 4096, zero, 4096)); /* plain zeroes are encrypted as anything else */
    read_below(disk, 6 * 4096, stored, 4096);
    CHECK(memcmp(stored, zero, 4096));
    CHECK(!disk_do(disk, PV_IO_DISCARD, 5 * 4096, NULL, 8192, 0));
    CHECK(!disk_read(disk, 5 * 4096, stored, 4096) && !memcmp(stored, zero, 4096));
    disk_close(disk);
    free(plain);
    forget();
}

static void it_is_as_a_disk(void)
{
    struct pv_instance *disk = memory_disk("d", SIZE, &loop);
    uint8_t *model = calloc(1, SIZE);
    unsigned seed = 3;

    new_key();
    attach(disk, "encrypt", settings);
    for (int i = 0; i < 60; i++)
        random_batch(disk, model, SIZE, &seed);
    check_all(disk, model, SIZE);
    disk_close(disk);
    free(model);
    forget();
}

static void neighbours_do_not_undo_one_another(void)
{
    struct pv_instance *disk = memory_disk("d", SIZE, &loop);

    new_key();
    attach(disk, "delay", "us=0 jitter_us=1000 types=read,write");
    attach(disk, "encrypt", settings);
    for (uint64_t block = 0; block < 128 * KIB; block += 4096)
        write_neighbours(disk, block);
    disk_close(disk);
    forget();
}

/* Segments that cut sectors in odd places, both ways. */
static void segments_may_lie_anyhow(void)
{
    struct pv_instance *disk = memory_disk("d", SIZE, &loop);
    uint8_t *data = pattern(64 * KIB, 4), *seen = calloc(1, 64 * KIB);
    unsigned seed = 8;

    new_key();
    attach(disk, "encrypt", settings);
    for (int round = 0; round < 50; round++) {
        struct iovec in[64], out[64];
        struct call call = {0};
        unsigned count = 0;

        for (uint64_t at = 0; at < 64 * KIB; count++) {
            uint64_t len = count == 63 ? 64 * KIB - at : 1 + (uint64_t)rand_r(&seed) % 6000;

            len = len > 64 * KIB - at ? 64 * KIB - at : len;
            in[count] = (struct iovec){data + at, len};
            out[count] = (struct iovec){seen + at, len};
            at += len;
        }
        call.io = (struct pv_io){.type = PV_IO_WRITE, .offset = 4096, .length = 64 * KIB, .iov = in, .iov_count = count, .done = call_done, .owner = &call};
        pv_instance_submit(disk, &call.io, 0);
        CHECK(!call_wait(&call, &loop));
        memset(seen, 0, 64 * KIB);
        call.over = false;
        call.io = (struct pv_io){.type = PV_IO_READ, .offset = 4096, .length = 64 * KIB, .iov = out, .iov_count = count, .done = call_done, .owner = &call};
        pv_instance_submit(disk, &call.io, 0);
        CHECK(!call_wait(&call, &loop) && !memcmp(seen, data, 64 * KIB));
    }
    disk_close(disk);
    free(data);
    free(seen);
    forget();
}

/* More requests than buffers, slow data: all of them are served. */
static void buffers_are_bounded(void)
{
    static struct call calls[200];
    struct pv_instance *disk = memory_disk("d", SIZE, &loop);
    uint8_t *data = pattern(SIZE, 5), *seen = calloc(1, SIZE);

    new_key();
    attach(disk, "delay", "us=200 types=all");
    attach(disk, "encrypt", settings);
    CHECK(!disk_write(disk, 0, data, SIZE));
    for (unsigned i = 0; i < 200; i++)
        call_start(&calls[i], disk, PV_IO_READ, i * 8192, seen + i * 8192, 8192, 0);
    for (unsigned i = 0; i < 200; i++)
        CHECK(!call_wait(&calls[i], &loop));
    CHECK(!memcmp(seen, data, 200 * 8192));
    disk_close(disk);
    free(data);
    free(seen);
    forget();
}

static void errors_from_below_come_up(void)
{
    struct pv_instance *disk = memory_disk("d", SIZE, &loop);
    uint8_t *data = pattern(SIZE, 5);

    new_key();
    attach(disk, "error", "types=write error=ENOSPC skip=3");
    disk->filters[0]->name[0]++; /* two of one class: other names */
    attach(disk, "error", "types=read offset=1M");
    attach(disk, "encrypt", settings);
    CHECK(disk_write(disk, 0, data, SIZE) == ENOSPC);
    CHECK(disk_read(disk, MIB - 4096, data, 8192) == EIO && !disk_read(disk, 0, data, MIB));
    CHECK(disk_write(disk, MIB + 512, data, 512) == EIO); /* a part of a sector: must be read first */
    disk_close(disk);
    free(data);
    forget();
}

static void bad_keys_are_refused(void)
{
    struct pv_instance *disk = memory_disk("d", SIZE + 512, &loop);
    uint8_t bytes[64], same[64];
    char text[256], hex[129];

    new_key();
    refused(disk, "encrypt", "state=/x", "key is not set");
    memset(same, 5, sizeof same);
    for (unsigned i = 0; i < 64; i++)
        bytes[i] = (uint8_t)(i * 7 + 2);
    snprintf(text, sizeof text, "key=%s state=%s", other, state);
    refused(disk, "encrypt", text, "No such file");
    write_file(other, bytes, 64, 0600);
    refused(disk, "encrypt", text, "not the key that the disk was encrypted with");
    write_file(other, bytes, 63, 0600);
    refused(disk, "encrypt", text, "64 bytes or 128");
    write_file(other, same, 64, 0600);
    refused(disk, "encrypt", text, "two halves");
    CHECK(!chmod(key, 0640));
    refused(disk, "encrypt", settings, "chmod 600");
    for (unsigned i = 0; i < 64; i++)
        snprintf(hex + 2 * i, 3, "%02x", (unsigned)(uint8_t)(i * 7 + 1));
    write_file(other, hex, 128, 0600);
    attach(disk, "encrypt", text);
    CHECK(disk->size == SIZE); /* whole sectors */
    disk_close(disk);
    write_file(state, "nonsense", 8, 0600);
    disk = memory_disk("d", SIZE, &loop);
    refused(disk, "encrypt", text, "no state file of encrypt");
    disk_close(disk);
    forget();
}

static void crc32c_is_crc32c(void)
{
    uint8_t *bytes = pattern(20000, 1);

    CHECK(pv_crc32c(0, "123456789", 9) == 0xe3069283); /* RFC 3720 */
    for (size_t len = 0; len < 20000; len += 1 + len / 3)
        CHECK(pv_crc32c(7, bytes, len) == pv_crc32c_table(7, bytes, len));
    CHECK(pv_crc32c(pv_crc32c(0, bytes, 5000), bytes + 5000, 15000) == pv_crc32c(0, bytes, 20000));
    free(bytes);
}

int main(void)
{
    int err;

    CHECK(mkdtemp(folder) && !pv_loop_open(&loop, 0, &err));
    snprintf(key, sizeof key, "%s/key", folder);
    snprintf(other, sizeof other, "%s/other", folder);
    snprintf(state, sizeof state, "%s/state", folder);
    crc32c_is_crc32c();
    what_is_stored_is_the_cipher();
    it_is_as_a_disk();
    neighbours_do_not_undo_one_another();
    segments_may_lie_anyhow();
    buffers_are_bounded();
    errors_from_below_come_up();
    bad_keys_are_refused();
    pv_loop_close(&loop);
    CHECK(!rmdir(folder));
    return 0;
}
