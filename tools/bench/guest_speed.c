/* The same work in a guest and in a plain process, so that docs/limits.md can say what emulation costs.
 *
 * Prints one line a case: name, operations, nanoseconds. Arguments: a folder to write in; perhaps an IPv4 address and a
 * port of a server that sends bytes until it is left alone. Static, so that it runs anywhere.
 */
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static uint64_t now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void report(const char *name, uint64_t operations, uint64_t start)
{
    printf("%s %llu %llu\n", name, (unsigned long long)operations, (unsigned long long)(now() - start));
}

static void integers(void)
{
    const uint64_t rounds = 20000000;
    uint64_t start = now(), x = 88172645463325252u;

    for (uint64_t i = 0; i < rounds; i++) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
    }
    report(x ? "cpu" : "cpu!", rounds, start);
}

static void memory(void)
{
    const uint64_t size = 32u << 20, rounds = 8;
    char *from = malloc(size), *to = malloc(size);
    uint64_t start;

    if (!from || !to)
        exit(1);
    memset(from, 1, size);
    memset(to, 2, size);
    start = now();
    for (uint64_t i = 0; i < rounds; i++)
        memcpy(to, from + (to[i] & 1), size - 1);
    report("memcpy_bytes", rounds * size, start);
    free(from);
    free(to);
}

static void system_calls(void)
{
    const uint64_t rounds = 200000;
    uint64_t start = now();

    for (uint64_t i = 0; i < rounds; i++)
        syscall(SYS_getppid);
    report("syscall", rounds, start);
}

static void processes(void)
{
    const uint64_t rounds = 100;
    uint64_t start = now();

    for (uint64_t i = 0; i < rounds; i++) {
        pid_t pid = fork();

        if (pid == 0)
            _exit(0);
        if (pid < 0 || waitpid(pid, NULL, 0) < 0)
            exit(1);
    }
    report("fork_wait", rounds, start);
}

static void files(const char *folder)
{
    enum { BLOCK = 4096, BLOCKS = 4096 };
    static char block[BLOCK];
    char path[4096];
    uint64_t start;
    int fd;

    snprintf(path, sizeof path, "%s/guest_speed.tmp", folder);
    fd = open(path, O_CREAT | O_TRUNC | O_RDWR, 0600);
    if (fd < 0)
        exit(1);
    start = now();
    for (int i = 0; i < BLOCKS; i++)
        if (write(fd, block, BLOCK) != BLOCK)
            exit(1);
    if (fsync(fd))
        exit(1);
    report("file_write_bytes", (uint64_t)BLOCK * BLOCKS, start);
    if (posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED))
        exit(1);
    start = now();
    for (int i = 0; i < BLOCKS; i++)
        if (pread(fd, block, BLOCK, (off_t)i * BLOCK) != BLOCK)
            exit(1);
    report("file_read_bytes", (uint64_t)BLOCK * BLOCKS, start);
    close(fd);
    unlink(path);
}

static int connected(const char *address, uint16_t port)
{
    struct sockaddr_in peer = {.sin_family = AF_INET, .sin_port = htons(port)};
    int fd = socket(AF_INET, SOCK_STREAM, 0), yes = 1;

    if (fd < 0 || inet_pton(AF_INET, address, &peer.sin_addr) != 1 ||
        connect(fd, (struct sockaddr *)&peer, sizeof peer) ||
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes))
        exit(1);
    return fd;
}

/* Two processes and the guest's own TCP: no device takes part. */
static void loopback(void)
{
    const int rounds = 2000;
    struct sockaddr_in own = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof own;
    int listener = socket(AF_INET, SOCK_STREAM, 0), fd;
    uint64_t start;
    char byte = 0;

    if (listener < 0 || bind(listener, (struct sockaddr *)&own, sizeof own) || listen(listener, 1) ||
        getsockname(listener, (struct sockaddr *)&own, &length))
        exit(1);
    if (fork() == 0) {
        fd = accept(listener, NULL, NULL);
        while (fd >= 0 && read(fd, &byte, 1) == 1 && write(fd, &byte, 1) == 1)
            ;
        _exit(0);
    }
    fd = connected("127.0.0.1", ntohs(own.sin_port));
    start = now();
    for (int i = 0; i < rounds; i++)
        if (write(fd, &byte, 1) != 1 || read(fd, &byte, 1) != 1)
            exit(1);
    report("tcp_loopback_ask", (uint64_t)rounds, start);
    close(fd);
    close(listener);
    wait(NULL);
}

static void from_server(const char *address, const char *port)
{
    const uint64_t wanted = 16u << 20;
    static char block[65536];
    uint64_t start = now(), got = 0;
    int fd = connected(address, (uint16_t)atoi(port));

    while (got < wanted) {
        ssize_t n = read(fd, block, sizeof block);

        if (n <= 0)
            exit(1);
        got += (uint64_t)n;
    }
    report("tcp_from_host_bytes", got, start);
    close(fd);
}

int main(int argc, char **argv)
{
    integers();
    memory();
    system_calls();
    processes();
    files(argc > 1 ? argv[1] : "/tmp");
    loopback();
    if (argc > 3)
        from_server(argv[2], argv[3]);
    return 0;
}
