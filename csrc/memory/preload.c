/* Preloaded into QEMU: hands the userfaultfd of its guest RAM to the fault server.
 *
 * QEMU does not give out a userfaultfd of its address space, and stays unmodified. This library wraps mmap64: when the file
 * that is guest RAM is mapped, it registers the mapping for missing pages and passes the descriptor over a socket, before
 * QEMU (or a back end) can touch a page.
 *
 * Environment: HV_RAM="<device>:<inode>:<socket fd>:<userfaultfd device fd or -1>", decimal. The message is "address length
 * file-offset" as three 64-bit numbers, with the descriptor as SCM_RIGHTS; the answer is one byte, 0 for "go on". On any
 * failure QEMU exits with a line on stderr and code 125: a guest must not run on RAM that nobody fills.
 *
 * The variable is removed from the environment when the library is loaded; nothing of this reaches a child.
 */
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
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static struct {
    int armed, socket, device;
    uintmax_t ram_device, ram_inode;
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

    real_mmap = (void *(*)(void *, size_t, int, int, int, off64_t))dlsym(RTLD_NEXT, "mmap64");
    if (!text)
        return;
    if (sscanf(text, "%ju:%ju:%d:%d", &config.ram_device, &config.ram_inode, &config.socket, &config.device) != 4) {
        errno = EINVAL;
        give_up("HV_RAM");
    }
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

static void pass(int uffd, uint64_t address, uint64_t length, uint64_t offset)
{
    uint64_t body[3] = {address, length, offset};
    struct iovec iov = {body, sizeof body};
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(sizeof(int))];
    } control = {0};
    struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    char answer = 1;

    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(header), &uffd, sizeof uffd);
    if (sendmsg(config.socket, &message, MSG_NOSIGNAL) != (ssize_t)sizeof body)
        give_up("passing the userfaultfd");
    if (recv(config.socket, &answer, 1, 0) != 1 || answer) {
        errno = ECONNREFUSED;
        give_up("the fault server did not take the mapping");
    }
}

static void hand_over(void *map, size_t length, off64_t offset)
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
    pass(uffd, (uintptr_t)map, length, (uint64_t)offset);
    close(uffd); /* the server holds it; a registration lives as long as any descriptor */
}

void *mmap64(void *address, size_t length, int protection, int flags, int fd, off64_t offset);

void *mmap64(void *address, size_t length, int protection, int flags, int fd, off64_t offset)
{
    void *map = real_mmap ? real_mmap(address, length, protection, flags, fd, offset)
                          : (void *)syscall(SYS_mmap, address, length, protection, flags, fd, offset);
    struct stat status;
    int saved = errno;

    if (map == MAP_FAILED || !config.armed || fd < 0 || !(flags & MAP_SHARED))
        return map;
    if (!fstat(fd, &status) && status.st_dev == config.ram_device && status.st_ino == config.ram_inode)
        hand_over(map, length, offset);
    errno = saved;
    return map;
}
