/* The guest of tests/integration/test_vsock.py and tools/bench/vsock.py: a static /init that serves raw AF_VSOCK,
 * without the agent.
 *
 * port 7   echoes, every connection in one process
 * port 9   takes numbered blocks until the end of file, answers "<bytes> <bad blocks>\n"
 * port 19  reads "<count>\n", sends so many numbered blocks, shuts its sending side, waits for the end
 * port 20  reads "<port>\n", connects to that port of CID 2, answers "connected\n" or "failed <errno>\n", then echoes
 * there port 21  accepts and never reads
 *
 * A block is 1 MiB of a fixed pseudo-random sequence, its first 8 bytes replaced by its number: a byte lost, doubled or
 * swapped shows.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/vm_sockets.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define BLOCK (1U << 20)
#define HOST_CID 2

static uint8_t block[BLOCK], buffer[BLOCK];

static void fill_block(void)
{
    uint64_t x = 88172645463325252ULL;

    for (size_t at = 0; at < BLOCK; at += sizeof(x)) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        memcpy(block + at, &x, sizeof(x));
    }
}

static int send_all(int fd, const void *data, size_t len)
{
    for (size_t done = 0; done < len;) {
        ssize_t n = write(fd, (const uint8_t *)data + done, len - done);

        if (n <= 0)
            return -1;
        done += (size_t)n;
    }
    return 0;
}

static size_t read_all(int fd, void *data, size_t len)
{
    size_t done = 0;

    while (done < len) {
        ssize_t n = read(fd, (uint8_t *)data + done, len - done);

        if (n <= 0)
            break;
        done += (size_t)n;
    }
    return done;
}

static uint64_t read_number(int fd)
{
    char line[32] = "";

    return read(fd, line, sizeof(line) - 1) > 0 ? strtoull(line, NULL, 10) : 0;
}

/* ---- what each port does ----------------------------------------------------------------------------------------- */

static void take_blocks(int fd)
{
    uint64_t total = 0, bad = 0;

    for (uint64_t number = 0;; number++) {
        size_t got = read_all(fd, buffer, BLOCK);

        total += got;
        if (got == 0)
            break;
        memcpy(block, &number, sizeof(number));
        bad += memcmp(block, buffer, got) != 0;
    }
    dprintf(fd, "%llu %llu\n", (unsigned long long)total, (unsigned long long)bad);
}

static void give_blocks(int fd)
{
    uint64_t count = read_number(fd);

    for (uint64_t number = 0; number < count; number++) {
        memcpy(block, &number, sizeof(number));
        if (send_all(fd, block, BLOCK) < 0)
            return;
    }
    shutdown(fd, SHUT_WR);
    read_all(fd, buffer, BLOCK);
}

static void echo(int from, int to)
{
    ssize_t n;

    while ((n = read(from, buffer, sizeof(buffer))) > 0)
        if (send_all(to, buffer, (size_t)n) < 0)
            return;
}

static void dial(int fd)
{
    struct sockaddr_vm host = {.svm_family = AF_VSOCK, .svm_cid = HOST_CID, .svm_port = (unsigned)read_number(fd)};
    int out = socket(AF_VSOCK, SOCK_STREAM, 0);

    if (connect(out, (struct sockaddr *)&host, sizeof(host)) < 0) {
        dprintf(fd, "failed %d\n", errno);
        return;
    }
    dprintf(fd, "connected\n");
    echo(out, out);
}

static void never_read(int fd)
{
    (void)fd;
    pause();
}

/* ---- serving ----------------------------------------------------------------------------------------------------- */

static int listen_on(unsigned port)
{
    struct sockaddr_vm any = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = port};
    int fd = socket(AF_VSOCK, SOCK_STREAM, 0);

    if (fd < 0 || bind(fd, (struct sockaddr *)&any, sizeof(any)) < 0 || listen(fd, 4096) < 0) {
        perror("listen");
        exit(1);
    }
    return fd;
}

static void serve_each(unsigned port, void (*serve)(int))
{
    int listener = listen_on(port);

    if (fork() > 0)
        return;
    for (;;) {
        int fd = accept(listener, NULL, NULL);

        if (fd >= 0 && fork() == 0) {
            serve(fd);
            exit(0);
        }
        close(fd);
    }
}

static void watch(int epoll, int fd)
{
    struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};

    epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
}

/* All in one process: a thousand connections at once need no thousand processes. */
static void serve_echo(unsigned port)
{
    int listener = listen_on(port), epoll = epoll_create1(0);

    if (fork() > 0)
        return;
    watch(epoll, listener);
    for (;;) {
        struct epoll_event event;

        if (epoll_wait(epoll, &event, 1, -1) != 1)
            continue;
        if (event.data.fd == listener) {
            watch(epoll, accept(listener, NULL, NULL));
            continue;
        }
        ssize_t n = read(event.data.fd, buffer, sizeof(buffer));

        if (n <= 0 || send_all(event.data.fd, buffer, (size_t)n) < 0)
            close(event.data.fd);
    }
}

/* ---- start ------------------------------------------------------------------------------------------------------- */

static void load_modules(void)
{
    FILE *list = fopen("/etc/modules", "r");
    char name[200], path[256];

    while (list && fscanf(list, "%199s", name) == 1) {
        snprintf(path, sizeof(path), "/modules/%s%s", name, strstr(name, ".ko") ? "" : ".ko");
        int fd = open(path, O_RDONLY);

        if (fd < 0 || syscall(SYS_finit_module, fd, "", 0) < 0)
            fprintf(stderr, "module %s: %s\n", path, strerror(errno));
        close(fd);
    }
}

static void prepare(void)
{
    struct rlimit many = {65536, 65536};

    mkdir("/proc", 0755);
    mkdir("/dev", 0755);
    mount("proc", "/proc", "proc", 0, NULL);
    mount("dev", "/dev", "devtmpfs", 0, NULL);
    int console = open("/dev/console", O_RDWR);

    for (int fd = 0; fd < 3; fd++)
        dup2(console, fd);
    setrlimit(RLIMIT_NOFILE, &many);
    signal(SIGCHLD, SIG_IGN);
    signal(SIGPIPE, SIG_IGN);
}

int main(void)
{
    prepare();
    load_modules();
    fill_block();
    serve_echo(7);
    serve_each(9, take_blocks);
    serve_each(19, give_blocks);
    serve_each(20, dial);
    serve_each(21, never_read);
    puts("vsock guest is up");
    fflush(stdout);
    for (;;)
        pause();
}
