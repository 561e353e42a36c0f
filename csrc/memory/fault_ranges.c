/* The mappings of guest RAM and their userfaultfds. See fault.h for the theory of operation. */
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "../common/cleanup.h"
#include "fault_rooms.h"

int pv_fault_knows_uffd(const struct pv_fault *server, int uffd)
{
    for (int i = 0; i < server->uffd_count; i++)
        if (server->uffds[i] == uffd)
            return 1;
    return 0;
}

/* Under `table`. */
static int insert_range(struct pv_fault *server, struct range range, int *err)
{
    int known = pv_fault_knows_uffd(server, range.uffd);

    if (!known && server->uffd_count == PV_FAULT_UFFDS)
        return fail(err, ENOSPC);
    for (int i = 0; i < PV_FAULT_RANGES; i++) {
        if (server->ranges[i].length)
            continue;
        server->ranges[i] = range;
        if (!known)
            server->uffds[server->uffd_count++] = range.uffd;
        return 0;
    }
    return fail(err, ENOSPC);
}

int pv_fault_add_range(struct pv_fault *server, int uffd, uint64_t start, uint64_t length, uint64_t offset, int *err)
{
    int result;

    if ((start | length | offset) % PV_PAGE_SIZE || !length || length > server->config.ram_bytes ||
        offset > server->config.ram_bytes - length || start > UINT64_MAX - length)
        return fail(err, EINVAL);
    pthread_mutex_lock(&server->table);
    result = insert_range(server, (struct range){uffd, start, length, offset}, err);
    pthread_mutex_unlock(&server->table);
    if (!result)
        eventfd_write(server->wake, 1);
    return result;
}

int pv_fault_open_own(struct pv_fault *server, int device, int *err)
{
    cleanup_fd int uffd = device >= 0 ? ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK)
                                      : (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_MISSING_SHMEM};

    if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api))
        return fail(err, errno);
    server->own_uffd = steal_fd(&uffd);
    return 0;
}

int pv_fault_register_own(struct pv_fault *server, void *start, uint64_t length, uint64_t offset, int *err)
{
    struct uffdio_register registration = {
        .range = {(uintptr_t)start, length},
        .mode = UFFDIO_REGISTER_MODE_MISSING,
    };

    if (server->own_uffd < 0)
        return fail(err, ENXIO);
    /* The range first: a touch between the two would find a registration that nobody serves. */
    if (pv_fault_add_range(server, server->own_uffd, (uintptr_t)start, length, offset, err))
        return -1;
    if (ioctl(server->own_uffd, UFFDIO_REGISTER, &registration)) {
        *err = errno;
        pv_fault_forget_own(server, start);
        return -1;
    }
    return 0;
}

void pv_fault_forget_own(struct pv_fault *server, const void *start)
{
    pthread_mutex_lock(&server->table);
    for (int i = 0; i < PV_FAULT_RANGES; i++)
        if (server->ranges[i].uffd == server->own_uffd && server->ranges[i].start == (uintptr_t)start)
            server->ranges[i].length = 0;
    pthread_mutex_unlock(&server->table);
}

int pv_fault_map_hook(void *server, int mapped, void *start, uint64_t length, uint64_t offset)
{
    int err = 0;

    if (mapped)
        return pv_fault_register_own(server, start, length, offset, &err) ? err : 0;
    pv_fault_forget_own(server, start);
    return 0;
}

/* The range of `uffd` that holds `address`; 0 when there is none. With uffd -1: the first range that holds RAM offset `address`. */
int pv_fault_find_range(struct pv_fault *server, int uffd, uint64_t address, struct range *out)
{
    int found = 0;

    pthread_mutex_lock(&server->table);
    for (int i = 0; i < PV_FAULT_RANGES && !found; i++) {
        const struct range *range = &server->ranges[i];
        uint64_t base = uffd < 0 ? range->offset : range->start;

        found = range->length && (uffd < 0 || range->uffd == uffd) && address >= base && address - base < range->length;
        if (found)
            *out = *range;
    }
    pthread_mutex_unlock(&server->table);
    return found;
}

void pv_fault_wake_range(const struct range *range, uint64_t address, uint64_t length)
{
    struct uffdio_range wake = {address, length};

    ioctl(range->uffd, UFFDIO_WAKE, &wake); /* fails only when the process has gone */
}

void pv_fault_wake_all(struct pv_fault *server)
{
    for (int i = 0; i < PV_FAULT_RANGES; i++) {
        struct range range;

        pthread_mutex_lock(&server->table);
        range = server->ranges[i];
        pthread_mutex_unlock(&server->table);
        if (range.length)
            pv_fault_wake_range(&range, range.start, range.length);
    }
}
