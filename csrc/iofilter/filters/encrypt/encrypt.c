/* AES-256-XTS, a sector of 4 KiB at a time, the sector's number as the tweak (IEEE 1619), by OpenSSL.
 *
 * What is read is never decrypted in the guest's memory, and what is written is encrypted on its way into a buffer: the guest sees plain
 * bytes only and cannot change what is being worked on (bounce.h). A sector that was never written, or that was discarded, is a hole and
 * reads as zeroes: a sector whose stored bytes are all zero is no cipher text (it would be one with a probability of 2^-32768).
 *
 * The key is 64 bytes in a file that nobody else may read. A key check value in the state file (an HMAC of a random salt under the key)
 * tells a wrong key when the disk is opened, not by garbage afterwards; it says nothing about the key. The state file never changes.
 *
 * What XTS does not do: it keeps secret, it does not tell that somebody exchanged or rolled back sectors. `integrity` finds accidents.
 */
#include <errno.h>
#include <fcntl.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../common/bounce.h"
#include "../common/crc32c.h"
#include "common/cleanup.h"

#define KEY_BYTES 64

/* The state file. */
struct check {
    char magic[8];
    uint32_t version, sector;
    uint8_t salt[32], value[32];
    uint32_t crc;
};

static const char check_magic[8] = "PVCRYPT";

struct encrypt {
    struct pv_filter filter;
    struct pv_bounce bounce;
    EVP_CIPHER_CTX *to_cipher, *to_plain;
};

static const char *const names[] = {"key", "state", NULL};

/* ---- the key ---- */

static int hex_digit(uint8_t c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    c |= 0x20;
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

static bool decode_hex(const uint8_t *text, uint8_t key[KEY_BYTES])
{
    for (unsigned i = 0; i < KEY_BYTES; i++) {
        int high = hex_digit(text[2 * i]), low = hex_digit(text[2 * i + 1]);

        if (high < 0 || low < 0)
            return false;
        key[i] = (uint8_t)(high << 4 | low);
    }
    return true;
}

/* 64 bytes as they are, or 128 hexadecimal digits and a newline or none. */
static int parse_key(const uint8_t *text, ssize_t len, uint8_t key[KEY_BYTES], const char *path, struct pv_fail *fail)
{
    if (len == KEY_BYTES)
        memcpy(key, text, KEY_BYTES);
    else if (!((len == 2 * KEY_BYTES || (len == 2 * KEY_BYTES + 1 && text[len - 1] == '\n')) && decode_hex(text, key)))
        return pv_fail(fail, EINVAL, "key %.120s: 64 bytes or 128 hexadecimal digits are wanted", path);
    if (!CRYPTO_memcmp(key, key + KEY_BYTES / 2, KEY_BYTES / 2))
        return pv_fail(fail, EINVAL, "key %.120s: its two halves are the same, which is no key for XTS", path);
    return 0;
}

static int read_key(const char *path, uint8_t key[KEY_BYTES], struct pv_fail *fail)
{
    cleanup_fd int fd = open(path, O_RDONLY | O_CLOEXEC);
    uint8_t text[2 * KEY_BYTES + 2];
    struct stat stat;
    ssize_t len;
    int result;

    if (fd < 0 || fstat(fd, &stat))
        return pv_fail(fail, errno, "key %.120s: %s", path, strerror(errno));
    if (!S_ISREG(stat.st_mode) || stat.st_mode & 077)
        return pv_fail(fail, EPERM, "key %.120s: must be a file that only its owner may read (chmod 600)", path);
    len = read(fd, text, sizeof text);
    result = parse_key(text, len, key, path, fail);
    OPENSSL_cleanse(text, sizeof text);
    return result;
}

/* ---- the key check value ---- */

static void compute_check(const uint8_t key[KEY_BYTES], const struct check *check, uint8_t value[32])
{
    unsigned len = 32;

    HMAC(EVP_sha256(), key, KEY_BYTES, (const uint8_t *)check, offsetof(struct check, value), value, &len);
}

static int write_check(const char *path, const uint8_t key[KEY_BYTES], struct pv_fail *fail)
{
    struct check check = {.version = 1, .sector = PV_BLOCK};
    cleanup_fd int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);

    if (fd < 0)
        return pv_fail(fail, errno, "state %.120s: %s", path, strerror(errno));
    memcpy(check.magic, check_magic, sizeof check.magic);
    if (getrandom(check.salt, sizeof check.salt, 0) == sizeof check.salt) {
        compute_check(key, &check, check.value);
        check.crc = pv_crc32c(0, &check, offsetof(struct check, crc));
        if (write(fd, &check, sizeof check) == sizeof check && !fsync(fd))
            return 0;
    }
    pv_fail(fail, errno ? errno : EIO, "state %.120s: %s", path, strerror(errno));
    unlink(path);
    return -1;
}

static int verify_check(const char *path, const uint8_t key[KEY_BYTES], struct pv_fail *fail)
{
    cleanup_fd int fd = open(path, O_RDONLY | O_CLOEXEC);
    struct check check;
    uint8_t value[32];

    if (fd < 0)
        return pv_fail(fail, errno, "state %.120s: %s", path, strerror(errno));
    if (read(fd, &check, sizeof check) != sizeof check || memcmp(check.magic, check_magic, sizeof check.magic) ||
        check.crc != pv_crc32c(0, &check, offsetof(struct check, crc)))
        return pv_fail(fail, EINVAL, "state %.120s: no state file of encrypt, or damaged", path);
    if (check.version > 1 || check.sector != PV_BLOCK)
        return pv_fail(fail, ENOTSUP, "state %.120s: has version %u, this program knows 1: use a newer one", path, check.version);
    compute_check(key, &check, value);
    if (CRYPTO_memcmp(value, check.value, sizeof value))
        return pv_fail(fail, EACCES, "this is not the key that the disk was encrypted with");
    return 0;
}

/* ---- sectors ---- */

static void set_tweak(EVP_CIPHER_CTX *context, uint64_t sector)
{
    uint8_t tweak[16] = {0};

    for (unsigned i = 0; i < 8; i++)
        tweak[i] = (uint8_t)(sector >> (8 * i));
    EVP_CipherInit_ex(context, NULL, NULL, NULL, tweak, -1);
}

static bool is_hole(const uint8_t *sector)
{
    return !sector[0] && !memcmp(sector, sector + 1, PV_BLOCK - 1);
}

static int decrypt_sector(struct encrypt *self, uint64_t at, const uint8_t *from, uint8_t *to)
{
    int len;

    if (is_hole(from)) {
        memset(to, 0, PV_BLOCK);
        return 0;
    }
    set_tweak(self->to_plain, at / PV_BLOCK);
    return EVP_DecryptUpdate(self->to_plain, to, &len, from, PV_BLOCK) == 1 ? 0 : EIO;
}

static int encrypt_sector(struct encrypt *self, uint64_t at, const uint8_t *from, uint8_t *to)
{
    int len;

    set_tweak(self->to_cipher, at / PV_BLOCK);
    return EVP_EncryptUpdate(self->to_cipher, to, &len, from, PV_BLOCK) == 1 ? 0 : EIO;
}

static int encrypt_open_chunk(struct pv_bounce *bounce, struct pv_chunk *chunk)
{
    struct encrypt *self = pv_member(bounce, struct encrypt, bounce);
    int error = 0;

    for (uint64_t i = 0; i < chunk->length && !error; i += PV_BLOCK)
        error = decrypt_sector(self, chunk->start + i, chunk->buffer + i, chunk->buffer + i);
    return error;
}

/* A sector that lies in one segment of the request, at *skip bytes of segment *index; NULL: it does not. Moves both behind it. */
static uint8_t *in_one_segment(const struct pv_io *io, unsigned *index, uint64_t *skip)
{
    uint8_t *at = NULL;
    uint64_t left = PV_BLOCK;

    while (*index < io->iov_count && *skip >= io->iov[*index].iov_len) {
        *skip -= io->iov[*index].iov_len;
        (*index)++;
    }
    if (*index < io->iov_count && io->iov[*index].iov_len - *skip >= left)
        at = (uint8_t *)io->iov[*index].iov_base + *skip;
    *skip += left;
    return at;
}

/* Whole sectors go from the buffer straight to the request's memory, which is not read back. */
static int encrypt_deliver(struct pv_bounce *bounce, struct pv_chunk *chunk)
{
    struct encrypt *self = pv_member(bounce, struct encrypt, bounce);
    struct pv_io *io = pv_chunk_io(chunk);
    uint64_t skip = chunk->from - io->offset;
    unsigned index = 0;
    int error = 0;

    if (chunk->to - chunk->from < chunk->length) {
        error = encrypt_open_chunk(bounce, chunk);
        if (!error)
            pv_chunk_copy_out(chunk);
        return error;
    }
    for (uint64_t i = 0; i < chunk->length && !error; i += PV_BLOCK) {
        uint8_t *at = in_one_segment(io, &index, &skip);

        error = decrypt_sector(self, chunk->start + i, chunk->buffer + i, at ? at : chunk->buffer + i);
        if (!at)
            pv_iov_copy_in(io->iov, io->iov_count, chunk->start + i - io->offset, chunk->buffer + i, PV_BLOCK);
    }
    return error;
}

/* Zeroes and discards become holes. */
static int encrypt_seal(struct pv_bounce *bounce, struct pv_chunk *chunk)
{
    struct encrypt *self = pv_member(bounce, struct encrypt, bounce);
    int error = 0;

    if (!chunk->buffer)
        return 0;
    for (uint64_t i = 0; i < chunk->length && !error; i += PV_BLOCK)
        error = encrypt_sector(self, chunk->start + i, chunk->buffer + i, chunk->buffer + i);
    return error;
}

static int encrypt_collect(struct pv_bounce *bounce, struct pv_chunk *chunk)
{
    struct encrypt *self = pv_member(bounce, struct encrypt, bounce);
    struct pv_io *io = pv_chunk_io(chunk);
    uint64_t skip = chunk->from - io->offset;
    unsigned index = 0;
    int error = 0;

    for (uint64_t i = 0; i < chunk->length && !error; i += PV_BLOCK) {
        uint8_t *at = in_one_segment(io, &index, &skip);

        if (!at)
            pv_iov_copy_out(io->iov, io->iov_count, chunk->start + i - io->offset, chunk->buffer + i, PV_BLOCK);
        error = encrypt_sector(self, chunk->start + i, at ? at : chunk->buffer + i, chunk->buffer + i);
    }
    return error;
}

static const struct pv_bounce_class encrypt_bounce = {
    .open = encrypt_open_chunk, .deliver = encrypt_deliver, .seal = encrypt_seal, .collect = encrypt_collect};

static void encrypt_request(struct pv_filter *filter, struct pv_io *io)
{
    pv_bounce_request(&((struct encrypt *)filter)->bounce, io);
}

/* ---- life ---- */

static int read_names(const struct pv_settings *settings, const char **key, const char **state, struct pv_fail *fail)
{
    if (pv_settings_known(settings, names, fail))
        return -1;
    *key = pv_setting_text(settings, "key", NULL);
    *state = pv_setting_text(settings, "state", NULL);
    if (!*key)
        return pv_fail(fail, EINVAL, "key is not set: name the file that holds the key");
    if (!*state)
        return pv_fail(fail, EINVAL, "state is not set: name the file that holds the key check value");
    return 0;
}

static int encrypt_create(const struct pv_settings *settings, uint64_t size, struct pv_fail *fail)
{
    const char *key_path, *state;
    uint8_t key[KEY_BYTES];
    int result;

    (void)size;
    if (read_names(settings, &key_path, &state, fail) || read_key(key_path, key, fail))
        return -1;
    result = write_check(state, key, fail);
    OPENSSL_cleanse(key, sizeof key);
    return result;
}

static EVP_CIPHER_CTX *new_context(const uint8_t key[KEY_BYTES], int encrypting)
{
    EVP_CIPHER_CTX *context = EVP_CIPHER_CTX_new();
    uint8_t tweak[16] = {0};

    if (context && EVP_CipherInit_ex(context, EVP_aes_256_xts(), NULL, key, tweak, encrypting) == 1)
        return context;
    EVP_CIPHER_CTX_free(context);
    return NULL;
}

static void encrypt_close(struct pv_filter *filter)
{
    struct encrypt *self = (struct encrypt *)filter;

    pv_bounce_free(&self->bounce);
    EVP_CIPHER_CTX_free(self->to_cipher);
    EVP_CIPHER_CTX_free(self->to_plain);
}

static int prepare(struct encrypt *self, const char *state, const uint8_t key[KEY_BYTES], struct pv_fail *fail)
{
    if (verify_check(state, key, fail))
        return -1;
    self->to_cipher = new_context(key, 1);
    self->to_plain = new_context(key, 0);
    if (self->to_cipher && self->to_plain)
        return 0;
    encrypt_close(&self->filter);
    return pv_fail(fail, ENOTSUP, "this OpenSSL has no AES-256-XTS, or no memory");
}

static void encrypt_detach(struct pv_filter *filter)
{
    pv_bounce_detach(&((struct encrypt *)filter)->bounce);
}

static void encrypt_resized(struct pv_filter *filter, uint64_t size)
{
    filter->size = size - size % PV_BLOCK;
}

static int encrypt_open(struct pv_filter *filter, const struct pv_settings *settings, struct pv_fail *fail)
{
    struct encrypt *self = (struct encrypt *)filter;
    const char *key_path, *state;
    uint8_t key[KEY_BYTES];
    int result;

    if (read_names(settings, &key_path, &state, fail) || read_key(key_path, key, fail))
        return -1;
    pv_bounce_init(&self->bounce, filter, &encrypt_bounce);
    result = prepare(self, state, key, fail);
    OPENSSL_cleanse(key, sizeof key);
    encrypt_resized(filter, filter->size);
    return result;
}

const struct pv_filter_class pv_encrypt_class = {
    .name = "encrypt",
    .order = PV_ENCRYPTION,
    .size = sizeof(struct encrypt),
    .types = PV_ALL_TYPES & ~(1u << PV_IO_FLUSH),
    .persistent = true,
    .create = encrypt_create,
    .open = encrypt_open,
    .close = encrypt_close,
    .detach = encrypt_detach,
    .request = encrypt_request,
    .resized = encrypt_resized,
};
