/* What somebody who has taken a VM's QEMU over would try next. Run through hv-confine as that VM's user by
 * tests/integration/test_confinement.py, which knows what must fail. Prints one line an attempt: "name result", where
 * result is the error's text, or "SUCCESS" for what must never be.
 *
 * hostile attack VICTIM_PID SECRET_ADDRESS VICTIM_DIR STATE_DIR SETUID_PROGRAM   (undoes what succeeds)
 * hostile victim DIR     the other VM: holds a secret in memory, a disk and sockets; prints "ready ADDRESS" and waits
 * hostile whoami         prints the effective user
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/types.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ipc.h>
#include <sys/mount.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

static const char abstract_name[] = "podvisor-drill";
enum { SHM_KEY = 0x70766472, FIRST_FREE_FD = 3, MAX_FD = 1024 };

static void report(const char *name, long result)
{
    printf("%s %s\n", name, result < 0 ? strerror(errno) : "SUCCESS");
    fflush(stdout);
}

static const char *join(const char *directory, const char *name)
{
    static char path[512];

    snprintf(path, sizeof path, "%s/%s", directory, name);
    return path;
}

static int try_open(const char *path, int flags)
{
    int fd = open(path, flags | O_CLOEXEC);

    if (fd >= 0)
        close(fd);
    return fd;
}

static int try_create(const char *path)
{
    int fd = open(path, O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0600);

    if (fd >= 0) {
        close(fd);
        unlink(path);
    }
    return fd;
}

static int try_connect(const char *path, int abstract)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    socklen_t length = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + (size_t)abstract + strlen(path));

    snprintf(address.sun_path + abstract, sizeof address.sun_path - (size_t)abstract, "%s", path);
    return connect(fd, (struct sockaddr *)&address, length);
}

static void attack_files(const char *victim, const char *state)
{
    report("open-victim-directory", try_open(victim, O_RDONLY | O_DIRECTORY));
    report("open-victim-disk", try_open(join(victim, "disk.img"), O_RDWR));
    report("connect-victim-socket", try_connect(join(victim, "qmp.sock"), 0));
    report("open-state-directory", try_open(join(state, "images"), O_RDONLY));
    report("open-token", try_open(join(state, "token"), O_RDONLY));
    report("open-shadow", try_open("/etc/shadow", O_RDONLY));
    report("open-proc", try_open("/proc/self/status", O_RDONLY));
    report("open-sys", try_open("/sys/kernel", O_RDONLY));
    report("open-mem", try_open("/dev/mem", O_RDWR));
    report("write-root", try_create("/planted"));
    report("write-dev", try_create("/dev/planted"));
    report("make-device", mknod("planted", S_IFCHR | 0600, makedev(1, 1)));
}

static long try_trace(pid_t pid)
{
    long result = ptrace(PTRACE_ATTACH, pid, 0, 0);

    if (result == 0) {
        waitpid(pid, NULL, __WALL);
        ptrace(PTRACE_DETACH, pid, 0, 0);
    }
    return result;
}

static void attack_memory(pid_t pid, void *secret)
{
    char buffer[16] = "";
    struct iovec local = {buffer, sizeof buffer};
    struct iovec remote = {secret, sizeof buffer};
    char path[64];
    int pidfd;
    int pair[2];
    char ring[256] = "";

    report("ptrace", try_trace(pid));
    report("read-memory", process_vm_readv(pid, &local, 1, &remote, 1, 0));
    report("write-memory", process_vm_writev(pid, &local, 1, &remote, 1, 0));
    snprintf(path, sizeof path, "/proc/%d/mem", pid);
    report("open-proc-mem", try_open(path, O_RDWR));
    pidfd = (int)syscall(SYS_pidfd_open, pid, 0);
    report("steal-descriptor", pidfd < 0 ? -1 : syscall(SYS_pidfd_getfd, pidfd, 0, 0));
    report("shared-memory", shmget(SHM_KEY, 4096, 0));
    report("abstract-socket", try_connect(abstract_name, 1));
    report("vsock-socket", socket(AF_VSOCK, SOCK_STREAM, 0));
    report("packet-socket", socket(AF_PACKET, SOCK_RAW, 0));
    report("raw-socket", socket(AF_INET, SOCK_RAW, 1));
    report("netlink-socket", socket(AF_NETLINK, SOCK_RAW, 0));
    report("datagram-pair", socketpair(AF_UNIX, SOCK_DGRAM, 0, pair));
    report("io-uring", syscall(SYS_io_uring_setup, 1, ring));
}

static void attack_processes(pid_t pid)
{
    struct rlimit none = {0, 0};

    report("limit-victim", prlimit(pid, RLIMIT_FSIZE, &none, NULL));
    report("signal", kill(pid, SIGTERM));
    report("signal-parent-host", kill(1, 0));
}

static void attack_privileges(const char *setuid_program)
{
    struct rlimit more = {RLIM_INFINITY, RLIM_INFINITY};
    pid_t child;
    int status = 0;

    report("setuid", setuid(0));
    report("setgid", setgid(0));
    report("raise-limit", setrlimit(RLIMIT_CORE, &more));
    report("chroot", chroot("."));
    report("mount", mount("x", ".", "tmpfs", 0, NULL));
    report("remount", mount(NULL, "/", NULL, MS_REMOUNT | MS_BIND, NULL));
    report("unmount", umount2("/dev", MNT_DETACH));
    report("new-user-namespace", unshare(CLONE_NEWUSER));
    fflush(stdout);
    child = fork();
    if (child == 0) {
        execl(setuid_program, setuid_program, "whoami", (char *)NULL);
        _exit(99);
    }
    waitpid(child, &status, 0);
}

static void attack_descriptors(void)
{
    int open_count = 0;

    for (int fd = FIRST_FREE_FD; fd < MAX_FD; fd++)
        open_count += fcntl(fd, F_GETFD) >= 0;
    printf("open-descriptors %d\n", open_count);
}

static int attack(char **arguments)
{
    pid_t victim = atoi(arguments[0]);

    attack_descriptors();
    attack_files(arguments[2], arguments[3]);
    attack_memory(victim, (void *)(uintptr_t)strtoull(arguments[1], NULL, 0));
    attack_processes(victim);
    attack_privileges(arguments[4]);
    puts("done");
    return 0;
}

static int listen_at(const char *path, int abstract)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    socklen_t length = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + (size_t)abstract + strlen(path));

    snprintf(address.sun_path + abstract, sizeof address.sun_path - (size_t)abstract, "%s", path);
    return bind(fd, (struct sockaddr *)&address, length) || listen(fd, 5) ? -1 : 0;
}

static int be_victim(const char *directory)
{
    static char secret[] = "the other VM's secret";
    int disk = open(join(directory, "disk.img"), O_CREAT | O_RDWR, 0600);

    if (disk < 0 || listen_at(join(directory, "qmp.sock"), 0) || listen_at(abstract_name, 1) ||
        shmget(SHM_KEY, 4096, IPC_CREAT | 0600) < 0) {
        perror("victim");
        return 1;
    }
    printf("ready %p\n", (void *)secret);
    fflush(stdout);
    pause();
    return 0;
}

int main(int argc, char **argv)
{
    if (argc == 7 && strcmp(argv[1], "attack") == 0)
        return attack(argv + 2);
    if (argc == 3 && strcmp(argv[1], "victim") == 0)
        return be_victim(argv[2]);
    if (argc == 2 && strcmp(argv[1], "whoami") == 0)
        return printf("setuid-program %s\n", geteuid() == 0 ? "SUCCESS" : "no privilege") < 0;
    return 2;
}
