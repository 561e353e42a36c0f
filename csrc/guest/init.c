/* The first program in a pod VM: /init of the initramfs.
 *
 * Theory of operation
 * -------------------
 * States, in order; each is one function below and nothing is ever undone:
 *
 *   1. early mounts     /proc /sys /dev of the initramfs
 *   2. modules          finit_module() of /modules/NAME.ko for each line of /etc/modules; each file is removed after it was loaded
 *   3. root disk        the virtio disk whose serial is `hv-root`; waits for kernel events when it is not there yet
 *   4. root             erofs, read-only, on /root; the early mounts move into it, and every mount that is the same in each
 *                       guest is made here, because a mount costs C microseconds and Python milliseconds (TCG)
 *   5. switch           /root becomes / (MS_MOVE and chroot: an initramfs cannot be pivoted)
 *   6. agent            execve() of Python, which stays PID 1 for ever
 *
 * On any failure: one line on the console, then power off, so that QEMU ends and the host shows that line.
 * The agent finds in its environment PODVISOR_BOOT_NS, the nanoseconds since boot (CLOCK_BOOTTIME) at which this program
 * began, had loaded the modules, had mounted the root, and executed the agent: "A,B,C,D".
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/netlink.h>
#include <net/if.h>
#include <poll.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "../common/cleanup.h"

#define ROOT_SERIAL "hv-root"
#define ROOT_WAIT_MS 10000
#define MODULE_LIST "/etc/modules"
#define NEW_ROOT "/root"
#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

struct mount_row {
    const char *source;
    const char *target;
    const char *type;
    unsigned long flags;
    const char *options;
};

static const struct mount_row early_mounts[] = {
    {"proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL},
    {"sysfs", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL},
    {"devtmpfs", "/dev", "devtmpfs", MS_NOSUID, "mode=0755"},
};

/* Below the new root, after the early mounts were moved there. Sizes are upper bounds: tmpfs takes memory as it is used. */
static const struct mount_row root_mounts[] = {
    {"cgroup2", NEW_ROOT "/sys/fs/cgroup", "cgroup2", MS_NOSUID | MS_NODEV | MS_NOEXEC, "nsdelegate"},
    {"devpts", NEW_ROOT "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "mode=0620,gid=5,ptmxmode=0666"},
    {"mqueue", NEW_ROOT "/dev/mqueue", "mqueue", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL},
    {"shm", NEW_ROOT "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=1777"},
    {"run", NEW_ROOT "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755,size=32m"},
    {"tmp", NEW_ROOT "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777,size=32m"},
    /* The root is read-only: mount points that depend on the pod (one per image, the data disk) are made by the agent here. */
    {"mnt", NEW_ROOT "/mnt", "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755,size=4m"},
};

static const char *const moved_mounts[] = {"/proc", "/sys", "/dev"};

/* Directories that devtmpfs lacks. */
static const char *const device_directories[] = {NEW_ROOT "/dev/pts", NEW_ROOT "/dev/shm", NEW_ROOT "/dev/mqueue"};

static const struct {
    const char *path, *value;
} settings[] = {
    /* Controllers for the containers' cgroups. A kernel without one of them still runs pods, so each is written on its own. */
    {NEW_ROOT "/sys/fs/cgroup/cgroup.subtree_control", "+cpu"},
    {NEW_ROOT "/sys/fs/cgroup/cgroup.subtree_control", "+cpuset"},
    {NEW_ROOT "/sys/fs/cgroup/cgroup.subtree_control", "+io"},
    {NEW_ROOT "/sys/fs/cgroup/cgroup.subtree_control", "+memory"},
    {NEW_ROOT "/sys/fs/cgroup/cgroup.subtree_control", "+pids"},
};

static const struct {
    const char *target, *path;
} links[] = {
    {"/proc/self/fd", NEW_ROOT "/dev/fd"},
    {"/proc/self/fd/0", NEW_ROOT "/dev/stdin"},
    {"/proc/self/fd/1", NEW_ROOT "/dev/stdout"},
    {"/proc/self/fd/2", NEW_ROOT "/dev/stderr"},
};

__attribute__((noreturn, format(printf, 1, 2))) static void give_up(const char *format, ...)
{
    int error = errno;
    va_list arguments;

    va_start(arguments, format);
    dprintf(STDERR_FILENO, "podvisor init: ");
    vdprintf(STDERR_FILENO, format, arguments);
    if (error)
        dprintf(STDERR_FILENO, ": %s", strerror(error));
    dprintf(STDERR_FILENO, "; powering off\n");
    va_end(arguments);
    fsync(STDERR_FILENO);
    sync();
    reboot(RB_POWER_OFF);
    _exit(1); /* power off refused: the kernel panics, and panic=-1 ends the VM all the same */
}

static uint64_t since_boot_ns(void)
{
    struct timespec now = {0};

    clock_gettime(CLOCK_BOOTTIME, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void mount_all(const struct mount_row *rows, size_t count)
{
    for (size_t i = 0; i < count; i++)
        if (mount(rows[i].source, rows[i].target, rows[i].type, rows[i].flags, rows[i].options) < 0)
            give_up("mounting %s on %s", rows[i].type, rows[i].target);
}

/* 2. modules ------------------------------------------------------------------------------------------------------- */

static void load_module(const char *name)
{
    char path[128];

    if ((size_t)snprintf(path, sizeof(path), "/modules/%s.ko", name) >= sizeof(path)) {
        errno = ENAMETOOLONG;
        give_up("module %.40s...", name);
    }
    cleanup_fd int fd = open(path, O_RDONLY | O_CLOEXEC);

    if (fd < 0)
        give_up("opening kernel module %s", path);
    if (syscall(SYS_finit_module, fd, "", 0) < 0 && errno != EEXIST)
        give_up("loading kernel module %s", name);
    unlink(path); /* gives the initramfs' memory back */
}

static void load_modules(void)
{
    cleanup_file FILE *list = fopen(MODULE_LIST, "re");
    char line[100];

    if (!list)
        give_up("opening " MODULE_LIST);
    while (fgets(line, sizeof(line), list)) {
        line[strcspn(line, "\n")] = 0;
        if (line[0])
            load_module(line);
    }
}

/* 3. root disk ----------------------------------------------------------------------------------------------------- */

/* Whether /sys/block/DISK/serial says `hv-root`. A disk that vanishes meanwhile is simply not it. */
static int is_root_disk(const char *disk)
{
    char path[300], serial[32];

    snprintf(path, sizeof(path), "/sys/block/%s/serial", disk);
    cleanup_fd int fd = open(path, O_RDONLY | O_CLOEXEC);

    if (fd < 0)
        return 0;
    ssize_t length = read(fd, serial, sizeof(serial) - 1);

    if (length <= 0)
        return 0;
    serial[length] = 0;
    serial[strcspn(serial, "\n")] = 0;
    return strcmp(serial, ROOT_SERIAL) == 0;
}

/* Writes the root disk's device path; 0 when there is no such disk now. */
static int find_root_disk(char *device, size_t size)
{
    cleanup_dir DIR *blocks = opendir("/sys/block");
    struct dirent *entry;

    if (!blocks)
        give_up("opening /sys/block");
    while ((entry = readdir(blocks)))
        if (strncmp(entry->d_name, "vd", 2) == 0 && is_root_disk(entry->d_name)) {
            snprintf(device, size, "/dev/%s", entry->d_name);
            return 1;
        }
    return 0;
}

static int open_event_socket(void)
{
    struct sockaddr_nl address = {.nl_family = AF_NETLINK, .nl_groups = 1};
    int fd = socket(AF_NETLINK, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, NETLINK_KOBJECT_UEVENT);

    if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof(address)) < 0)
        give_up("opening the kernel's event socket");
    return fd;
}

/* Sleeps until the kernel tells of some device, at most until `deadline` (CLOCK_BOOTTIME ns); 0 when that has passed. */
static int wait_for_device_event(int events, uint64_t deadline)
{
    char message[4096];
    uint64_t now = since_boot_ns();

    if (now >= deadline)
        return 0;
    poll(&(struct pollfd){.fd = events, .events = POLLIN}, 1, (int)((deadline - now) / 1000000u) + 1);
    while (recv(events, message, sizeof(message), 0) > 0)
        ;
    return 1;
}

static void wait_for_root_disk(char *device, size_t size)
{
    if (find_root_disk(device, size)) /* the rule: virtio_blk probes its disks while it is loaded */
        return;
    uint64_t deadline = since_boot_ns() + ROOT_WAIT_MS * 1000000ull;
    cleanup_fd int events = open_event_socket();

    while (!find_root_disk(device, size))
        if (!wait_for_device_event(events, deadline)) {
            errno = 0;
            give_up("no virtio disk with serial " ROOT_SERIAL " appeared within %d s", ROOT_WAIT_MS / 1000);
        }
}

/* 4. root ---------------------------------------------------------------------------------------------------------- */

static void mount_root(const char *device)
{
    if (mount(device, NEW_ROOT, "erofs", MS_RDONLY, NULL) < 0)
        give_up("mounting %s as erofs", device);
    for (size_t i = 0; i < COUNT(moved_mounts); i++) {
        char target[64];

        snprintf(target, sizeof(target), NEW_ROOT "%s", moved_mounts[i]);
        if (mount(moved_mounts[i], target, NULL, MS_MOVE, NULL) < 0)
            give_up("moving %s", moved_mounts[i]);
    }
}

static void apply_settings(void)
{
    for (size_t i = 0; i < COUNT(settings); i++) {
        cleanup_fd int fd = open(settings[i].path, O_WRONLY | O_CLOEXEC);

        if (fd < 0 || write(fd, settings[i].value, strlen(settings[i].value)) < 0)
            dprintf(STDERR_FILENO, "podvisor init: writing %s to %s: %s\n", settings[i].value, settings[i].path, strerror(errno));
    }
}

static void bring_loopback_up(void)
{
    struct ifreq request = {.ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING};
    cleanup_fd int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

    if (fd < 0 || ioctl(fd, SIOCSIFFLAGS, &request) < 0)
        give_up("bringing the loopback interface up");
}

static void furnish_root(void)
{
    for (size_t i = 0; i < COUNT(device_directories); i++)
        if (mkdir(device_directories[i], 0755) < 0 && errno != EEXIST)
            give_up("making %s", device_directories[i]);
    mount_all(root_mounts, COUNT(root_mounts));
    for (size_t i = 0; i < COUNT(links); i++)
        if (symlink(links[i].target, links[i].path) < 0 && errno != EEXIST)
            give_up("making %s", links[i].path);
    apply_settings();
    bring_loopback_up();
}

/* 5. switch, 6. agent ---------------------------------------------------------------------------------------------- */

static void switch_root(void)
{
    if (chdir(NEW_ROOT) < 0 || mount(".", "/", NULL, MS_MOVE, NULL) < 0 || chroot(".") < 0 || chdir("/") < 0)
        give_up("switching to the new root");
}

/* Standard input is /dev/null: nobody types on the console. Output stays the console. */
static void close_input(void)
{
    cleanup_fd int null = open("/dev/null", O_RDONLY | O_CLOEXEC);

    if (null < 0 || dup2(null, STDIN_FILENO) < 0)
        give_up("opening /dev/null");
}

__attribute__((noreturn)) static void execute_agent(const uint64_t marks[3])
{
    /* -I -S: no site directories, nothing from the environment; -X utf8: the guest has no locales. */
    static char *const argv[] = {"/usr/bin/python3", "-I", "-S", "-X", "utf8", "/usr/lib/podvisor/agent_main.pyc", NULL};
    char boot[128];
    char *const environment[] = {"PATH=/usr/sbin:/usr/bin", "HOME=/", "TERM=linux", boot, NULL};

    snprintf(boot, sizeof(boot), "PODVISOR_BOOT_NS=%llu,%llu,%llu,%llu", (unsigned long long)marks[0],
             (unsigned long long)marks[1], (unsigned long long)marks[2], (unsigned long long)since_boot_ns());
    execve(argv[0], argv, environment);
    give_up("executing %s", argv[0]);
}

int main(void)
{
    char device[300];
    uint64_t marks[3] = {since_boot_ns()};

    umask(0);
    mount_all(early_mounts, COUNT(early_mounts));
    load_modules();
    marks[1] = since_boot_ns();
    wait_for_root_disk(device, sizeof(device));
    mount_root(device);
    furnish_root();
    marks[2] = since_boot_ns();
    switch_root();
    umask(022);
    close_input();
    execute_agent(marks);
}
