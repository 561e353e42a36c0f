/* Preloaded into QEMU: lends out the memfd that is guest RAM, and hands over its userfaultfd.
 *
 * QEMU gives out neither, and stays unmodified. This library wraps mmap64: when guest RAM is mapped (a shared mapping of a
 * memfd of exactly the stated size), it passes the memfd over a socket; and, when asked to, first registers the mapping for
 * missing pages and passes that descriptor too, before QEMU (or a back end) can touch a page.
 *
 * Environment: HV_RAM="<bytes>:<socket fd>:<mode>", mode "lend" (the memfd only: a template is being made) or "serve" (the
 * userfaultfd as well), then ":<fd of /dev/userfaultfd>" or ":-1" for the system call. The message is "address length
 * file-offset" as three 64-bit numbers, with the memfd, and after it the userfaultfd, as SCM_RIGHTS; the answer is one byte,
 * 0 for "go on". On any failure QEMU exits with a line on stderr and code 125: a guest must not run on RAM that nobody fills.
 *
 * The variable is removed from the environment when the library is loaded; nothing of this reaches a child.
 */
#include "preload.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

static struct {
    int armed, socket, serve, device;
    size_t bytes;
} config;

static void *(*real_mmap)(void *, size_t, int, int, int, off64_t);

static __attribute__((noreturn)) void give_up(const char *what)
{
    fprintf(stderr, "hv-ram: %s: %s\n", what, strerror(errno));
    _exit(125);
}

static __attribute__((constructor)) void load(void)
{
    const char *text = getenv("HV_RAM");
    char mode[6] = "";

    real_mmap = (void *(*)(void *, size_t, int, int, int, off64_t))dlsym(RTLD_NEXT, "mmap64");
    if (!text)
        return;
    if (sscanf(text, "%zu:%d:%5[a-z]:%d", &config.bytes, &config.socket, mode, &config.device) != 4 ||
        (strcmp(mode, "lend") && strcmp(mode, "serve"))) {
        errno = EINVAL;
        give_up("HV_RAM");
    }
    config.serve = !strcmp(mode, "serve");
    if (config.serve)
        pv_trim_start();
    config.armed = 1;
    unsetenv("HV_RAM");
    unsetenv("LD_PRELOAD");
}

static int open_uffd(void)
{
    if (config.device >= 0)
        return ioctl(config.device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
    return (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
}

/* Passes memfd and, unless it is -1, userfaultfd; returns when the other side has answered "go on". */
static void pass(int memfd, int uffd, uint64_t address, uint64_t length, uint64_t offset)
{
    uint64_t body[3] = {address, length, offset};
    int fds[2] = {memfd, uffd};
    size_t fds_size = uffd < 0 ? sizeof(int) : sizeof fds;
    struct iovec iov = {body, sizeof body};
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(sizeof fds)];
    } control = {0};
    struct msghdr message = {
        .msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = CMSG_SPACE(fds_size)};
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    char answer = 1;

    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(fds_size);
    memcpy(CMSG_DATA(header), fds, fds_size);
    if (sendmsg(config.socket, &message, MSG_NOSIGNAL) != (ssize_t)sizeof body)
        give_up("passing guest RAM");
    if (recv(config.socket, &answer, 1, 0) != 1 || answer) {
        errno = ECONNREFUSED;
        give_up("guest RAM was not taken");
    }
}

static int register_missing(void *map, size_t length)
{
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_EVENT_REMOVE};
    struct uffdio_register registration = {
        .range = {(uintptr_t)map, length},
        .mode = UFFDIO_REGISTER_MODE_MISSING,
    };
    int uffd = open_uffd();

    if (uffd < 0)
        give_up("userfaultfd");
    if (ioctl(uffd, UFFDIO_API, &api) || ioctl(uffd, UFFDIO_REGISTER, &registration))
        give_up("registering guest RAM");
    return uffd;
}

static void hand_over(void *map, size_t length, int memfd, off64_t offset)
{
    int uffd = config.serve ? register_missing(map, length) : -1;

    /* The userfaultfd stays open here too: the registration lives as long as any descriptor of it, so a server that is killed
     * leaves a guest that waits (for its successor, or for its end), never one that reads zeroes. */
    pass(memfd, uffd, (uintptr_t)map, length, (uint64_t)offset);
}

static int is_ram(int fd, size_t length, int flags)
{
    /* Only a memfd (and a file on hugetlbfs or tmpfs) answers this, and QEMU maps no other of this size. */
    return fd >= 0 && (flags & MAP_SHARED) && length == config.bytes && fcntl(fd, F_GET_SEALS) >= 0;
}

__attribute__((visibility("default"))) void *mmap64(void *address, size_t length, int protection, int flags, int fd, off64_t offset);

void *mmap64(void *address, size_t length, int protection, int flags, int fd, off64_t offset)
{
    void *map = real_mmap ? real_mmap(address, length, protection, flags, fd, offset)
                          : (void *)syscall(SYS_mmap, address, length, protection, flags, fd, offset);
    int saved = errno;

    if (map != MAP_FAILED && config.armed && is_ram(fd, length, flags))
        hand_over(map, length, fd, offset);
    errno = saved;
    return map;
}
