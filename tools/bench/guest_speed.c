/* The same work in a guest and in a plain process, so that docs/limits.md can say what emulation costs.
 *
 * Prints one line a case: name, operations, nanoseconds. Argument: a folder to write in. Static, so that it runs anywhere.
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
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

int main(int argc, char **argv)
{
    integers();
    memory();
    system_calls();
    processes();
    files(argc > 1 ? argv[1] : "/tmp");
    return 0;
}
