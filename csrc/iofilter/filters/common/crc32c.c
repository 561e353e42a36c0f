/* The instruction takes 3 cycles and can start every cycle: three streams at a time fill it, and their results are joined by shifting the
 * first two over the bytes that followed them (Gopal et al., "Fast CRC Computation for iSCSI Polynomial Using CRC32 Instruction", Intel 2011; the
 * shift is a multiplication by x^(8n) modulo the polynomial, done by tables as in M. Adler's crc32c.c). */
#include "crc32c.h"

#include <pthread.h>
#include <stdbool.h>
#include <string.h>

#define POLYNOMIAL 0x82f63b78u /* reflected */
#define STREAM 1360            /* bytes of each of three streams: 3 * 1360 = 4080 of a block of 4096 */

static uint32_t table[256];
static uint32_t shift_one[4][256], shift_two[4][256]; /* over STREAM and over 2 * STREAM bytes of zeroes */
static pthread_once_t once = PTHREAD_ONCE_INIT;
static bool hardware;

/* The product of two polynomials modulo the polynomial, reflected. */
static uint32_t multiply(uint32_t a, uint32_t b)
{
    uint32_t product = 0;

    for (uint32_t bit = 1u << 31; bit; bit >>= 1) {
        if (a & bit)
            product ^= b;
        b = b & 1 ? (b >> 1) ^ POLYNOMIAL : b >> 1;
    }
    return product;
}

/* x^(8 * bytes) modulo the polynomial. */
static uint32_t power(uint64_t bytes)
{
    uint32_t result = 1u << 31, square = 1u << 23; /* 1, and x^8 */

    for (; bytes; bytes >>= 1) {
        if (bytes & 1)
            result = multiply(result, square);
        square = multiply(square, square);
    }
    return result;
}

static void make_shift(uint32_t shift[4][256], uint64_t bytes)
{
    uint32_t by = power(bytes);

    for (uint32_t n = 0; n < 256; n++)
        for (unsigned i = 0; i < 4; i++)
            shift[i][n] = multiply(by, n << (8 * i));
}

static void make_tables(void)
{
    for (uint32_t n = 0; n < 256; n++) {
        uint32_t crc = n;

        for (int k = 0; k < 8; k++)
            crc = crc & 1 ? (crc >> 1) ^ POLYNOMIAL : crc >> 1;
        table[n] = crc;
    }
    make_shift(shift_one, STREAM);
    make_shift(shift_two, 2 * STREAM);
#ifdef __x86_64__
    hardware = __builtin_cpu_supports("sse4.2");
#endif
}

uint32_t pv_crc32c_table(uint32_t crc, const void *data, size_t len)
{
    const uint8_t *at = data;

    pthread_once(&once, make_tables);
    crc = ~crc;
    while (len--)
        crc = (crc >> 8) ^ table[(crc ^ *at++) & 0xff];
    return ~crc;
}

#ifdef __x86_64__
static uint32_t shifted(const uint32_t shift[4][256], uint32_t crc)
{
    return shift[0][crc & 0xff] ^ shift[1][(crc >> 8) & 0xff] ^ shift[2][(crc >> 16) & 0xff] ^ shift[3][crc >> 24];
}

static inline uint64_t word_at(const uint8_t *at)
{
    uint64_t word;

    memcpy(&word, at, sizeof word);
    return word;
}

__attribute__((target("sse4.2"))) static uint32_t by_instruction(uint32_t start, const uint8_t *at, size_t len)
{
    uint64_t crc = (uint32_t)~start;

    for (; len >= 3 * STREAM; at += 3 * STREAM, len -= 3 * STREAM) {
        uint64_t second = 0, third = 0;

        for (size_t i = 0; i < STREAM; i += 8) {
            crc = __builtin_ia32_crc32di(crc, word_at(at + i));
            second = __builtin_ia32_crc32di(second, word_at(at + STREAM + i));
            third = __builtin_ia32_crc32di(third, word_at(at + 2 * STREAM + i));
        }
        crc = shifted(shift_two, (uint32_t)crc) ^ shifted(shift_one, (uint32_t)second) ^ (uint32_t)third;
    }
    for (; len >= 8; at += 8, len -= 8)
        crc = __builtin_ia32_crc32di(crc, word_at(at));
    for (; len; at++, len--)
        crc = __builtin_ia32_crc32qi((uint32_t)crc, *at);
    return ~(uint32_t)crc;
}
#endif

uint32_t pv_crc32c(uint32_t crc, const void *data, size_t len)
{
    pthread_once(&once, make_tables);
#ifdef __x86_64__
    if (hardware)
        return by_instruction(crc, data, len);
#endif
    return pv_crc32c_table(crc, data, len);
}
