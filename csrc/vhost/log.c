/* The log of what was written: a bit for each page of guest memory, for a front end that copies it while the guest
 * runs. */
#include <sys/mman.h>

#include "rooms.h"

#define LOG_PAGE 4096U

bool pv_fe_logging(const struct pv_fe *fe)
{
    return fe->log.map && (fe->features & PV_F_LOG_ALL);
}

void pv_fe_log_guest(struct pv_fe *fe, uint64_t addr, uint64_t len)
{
    for (uint64_t page = addr / LOG_PAGE; len > 0 && page <= (addr + len - 1) / LOG_PAGE; page++)
        if (page / 8 < fe->log.size)
            __atomic_fetch_or(&fe->log.map[page / 8], (uint8_t)(1U << (page % 8)), __ATOMIC_RELAXED);
}

/* A pointer into guest memory comes from the table, so exactly one region has it. */
static void log_host(struct pv_fe *fe, const void *start, size_t len)
{
    const uint8_t *at = start;

    for (unsigned i = 0; i < fe->mem.count; i++) {
        const struct pv_region *r = &fe->mem.regions[i];

        if (at >= r->host && at < r->host + r->size)
            pv_fe_log_guest(fe, r->guest + (uint64_t)(at - r->host), len);
    }
}

void pv_fe_log_written(struct pv_fe *fe, const struct iovec *iov, unsigned count, size_t len)
{
    if (!pv_fe_logging(fe))
        return;
    for (unsigned i = 0; i < count && len > 0; i++) {
        size_t part = iov[i].iov_len < len ? iov[i].iov_len : len;

        log_host(fe, iov[i].iov_base, part);
        len -= part;
    }
}

void pv_fe_drop_log(struct pv_fe *fe)
{
    if (fe->log.map)
        munmap(fe->log.map, fe->log.size);
    fe->log = (struct pv_log){0};
}
