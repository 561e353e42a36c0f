/* Theory of operation
 *
 *   collect   every path to be shown becomes a detached copy of its mount (open_tree), while the old root is there
 *   cover     a fresh tmpfs is mounted over a directory that surely exists; it will be the root
 *   populate  for each path: directories (or an empty file) are made in the tmpfs and the copy is attached there;
 *             then /dev with a few devices, and /tmp
 *   turn      pivot_root(".", ".") puts the old root on top of the new one, and a lazy unmount takes it off again,
 *             so that no descriptor and no path leads back
 *   seal      the tmpfs becomes read-only
 *
 * Nothing of this is seen outside: the mount namespace is new and its propagation was cut first.
 * /proc and /sys are not there: with them the program could see other processes and much of the kernel.
 */
#include "view.h"

#include "../common/cleanup.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/mount.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>

/* glibc 2.31 and older have no wrappers, and <sys/mount.h> clashes with <linux/mount.h>. */
int mount(const char *source, const char *target, const char *type, unsigned long flags, const void *data);
int umount2(const char *target, int flags);
enum { PV_MS_RDONLY = 1, PV_MS_NOSUID = 2, PV_MS_NODEV = 4, PV_MS_NOEXEC = 8, PV_MS_REMOUNT = 32, PV_MS_BIND = 4096 };
enum { PV_MS_REC = 16384, PV_MS_PRIVATE = 1 << 18, PV_MNT_DETACH = 2 };
#ifndef AT_RECURSIVE
#define AT_RECURSIVE 0x8000
#endif

/* Any directory that is there on every machine; nothing in it is needed any more when it is covered, since all that is
 * shown was collected before. */
static const char cover[] = "/usr";

static int open_mount(const char *path)
{
    return (int)syscall(SYS_open_tree, AT_FDCWD, path, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_RECURSIVE);
}

static int attach_mount(int tree, const char *target)
{
    return (int)syscall(SYS_move_mount, tree, "", AT_FDCWD, target, MOVE_MOUNT_F_EMPTY_PATH);
}

static int restrict_mount(int tree, uint64_t attributes)
{
    struct mount_attr attr = {.attr_set = attributes};

    return (int)syscall(SYS_mount_setattr, tree, "", AT_EMPTY_PATH | AT_RECURSIVE, &attr, sizeof attr);
}

static int write_file(const char *path, const char *text, struct failure *f)
{
    cleanup_fd int fd = open(path, O_WRONLY | O_CLOEXEC);

    if (fd < 0 || write(fd, text, strlen(text)) < 0)
        return fail(f, errno, "writing %s", path);
    return 0;
}

/* An unprivileged user may map only itself, and only after giving up setgroups(). */
static int map_self(uid_t uid, gid_t gid, struct failure *f)
{
    char text[64];

    if (write_file("/proc/self/setgroups", "deny", f))
        return -1;
    snprintf(text, sizeof text, "%u %u 1", uid, uid);
    if (write_file("/proc/self/uid_map", text, f))
        return -1;
    snprintf(text, sizeof text, "%u %u 1", gid, gid);
    return write_file("/proc/self/gid_map", text, f);
}

int view_unshare(const struct options *o, struct failure *f)
{
    uid_t uid = geteuid();
    gid_t gid = getegid();
    int flags = 0;

    if (o->user_namespace)
        flags |= CLONE_NEWUSER;
    if (o->private_root)
        flags |= CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS;
    if (o->new_network)
        flags |= CLONE_NEWNET;
    if (flags == 0)
        return 0;
    if (unshare(flags))
        return fail(f, errno, "making new namespaces%s", o->user_namespace ? " in a user namespace" : "");
    if (o->user_namespace && map_self(uid, gid, f))
        return -1;
    if (o->private_root && mount(NULL, "/", NULL, PV_MS_REC | PV_MS_PRIVATE, NULL))
        return fail(f, errno, "cutting mount propagation");
    return 0;
}

static int collect(struct options *o, struct failure *f)
{
    for (size_t i = 0; i < o->bind_count; i++) {
        struct bind_mount *bind = &o->binds[i];
        uint64_t attributes = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | (bind->writable ? 0 : MOUNT_ATTR_RDONLY);

        bind->tree = open_mount(bind->path);
        if (bind->tree < 0)
            return fail(f, errno, "showing %s", bind->path);
        if (restrict_mount(bind->tree, attributes))
            return fail(f, errno, "restricting the mount of %s", bind->path);
    }
    return 0;
}

/* Makes every directory above the last component of a path relative to the working directory. A component that is there
 * already may itself be something shown (a disk below a directory shown earlier); then it must exist in there. */
static int make_parents(const char *relative, struct failure *f)
{
    char path[PATH_MAX];

    snprintf(path, sizeof path, "%s", relative);
    for (char *slash = path; (slash = strchr(slash + 1, '/'));) {
        *slash = '\0';
        if (mkdir(path, 0755) && errno != EEXIST)
            return fail(f, errno, "making /%s in the private root", path);
        *slash = '/';
    }
    return 0;
}

/* `tree` is what will be attached there: the target must be of the same kind. */
static int make_target(const char *relative, int tree, struct failure *f)
{
    struct stat shown;
    struct stat there;

    if (fstatat(tree, "", &shown, AT_EMPTY_PATH))
        return fail(f, errno, "looking at what becomes /%s", relative);
    if (stat(relative, &there) == 0)
        return 0;
    if (make_parents(relative, f))
        return -1;
    if (S_ISDIR(shown.st_mode)) {
        if (mkdir(relative, 0755))
            return fail(f, errno, "making /%s in the private root", relative);
    } else {
        cleanup_fd int fd = open(relative, O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0644);

        if (fd < 0)
            return fail(f, errno, "making /%s in the private root", relative);
    }
    return 0;
}

static int attach(int *tree, const char *relative, struct failure *f)
{
    if (make_target(relative, *tree, f))
        return -1;
    if (attach_mount(*tree, relative))
        return fail(f, errno, "attaching /%s", relative);
    close(steal_fd(tree));
    return 0;
}

struct device {
    const char *name;
    bool own; /* nobody else may use this node: it belongs to the VM's user alone */
    int tree; /* the host's node; -1 when a node of our own could be made */
    struct stat host;
};

enum { MAX_DEVICES = CONFINE_MAX_LIST + 3 };

static void close_devices(struct device (*devices)[MAX_DEVICES])
{
    for (size_t i = 0; i < MAX_DEVICES; i++)
        if ((*devices)[i].name)
            pv_cleanup_fd(&(*devices)[i].tree);
}

static int collect_device(struct device *device, struct failure *f)
{
    char path[64];

    snprintf(path, sizeof path, "/dev/%s", device->name);
    device->tree = -1;
    if (stat(path, &device->host))
        return fail(f, errno, "looking at %s", path);
    if (!S_ISCHR(device->host.st_mode))
        return fail(f, ENODEV, "%s is no character device", path);
    device->tree = open_mount(path);
    if (device->tree < 0)
        return fail(f, errno, "showing %s", path);
    return 0;
}

static int collect_devices(const struct options *o, struct device *devices, size_t *count, struct failure *f)
{
    static const char *const always[] = {"null", "zero", "urandom"};

    for (size_t i = 0; i < sizeof always / sizeof *always; i++)
        devices[(*count)++] = (struct device){.name = always[i], .tree = -1};
    for (size_t i = 0; i < o->devices.count; i++)
        devices[(*count)++] = (struct device){.name = o->devices.items[i], .own = true, .tree = -1};
    for (size_t i = 0; i < *count; i++)
        if (collect_device(&devices[i], f))
            return -1;
    return 0;
}

/* A node of our own can belong to the VM's user, who need not be in the group kvm then. Where nodes cannot be made (a
 * user namespace, a container), the host's node is shown with the host's permissions. */
static int place_device(struct device *device, const struct options *o, struct failure *f)
{
    char relative[64];
    mode_t mode = device->own ? 0600 : 0666;

    snprintf(relative, sizeof relative, "dev/%s", device->name);
    if (make_parents(relative, f))
        return -1;
    if (o->has_identity && mknod(relative, S_IFCHR | mode, device->host.st_rdev) == 0) {
        if (chown(relative, device->own ? o->uid : 0, device->own ? o->gid : 0) || chmod(relative, mode))
            return fail(f, errno, "giving /%s to the user", relative);
        return 0;
    }
    return attach(&device->tree, relative, f);
}

/* A file system of its own: the rest of the view is mounted nodev, this one cannot be. */
static int build_dev(struct device *devices, size_t count, const struct options *o, struct failure *f)
{
    if (mkdir("dev", 0755) || mount("hv-dev", "dev", "tmpfs", PV_MS_NOSUID | PV_MS_NOEXEC, "mode=0755,size=64k"))
        return fail(f, errno, "mounting /dev in the private root");
    for (size_t i = 0; i < count; i++)
        if (place_device(&devices[i], o, f))
            return -1;
    if (mount(NULL, "dev", NULL, PV_MS_REMOUNT | PV_MS_BIND | PV_MS_RDONLY | PV_MS_NOSUID | PV_MS_NOEXEC, NULL))
        return fail(f, errno, "sealing /dev in the private root");
    return 0;
}

static int turn(struct failure *f)
{
    if (syscall(SYS_pivot_root, ".", "."))
        return fail(f, errno, "turning to the private root");
    if (umount2(".", PV_MNT_DETACH))
        return fail(f, errno, "letting the old root go");
    if (chdir("/"))
        return fail(f, errno, "entering the private root");
    if (mount(NULL, "/", NULL, PV_MS_REMOUNT | PV_MS_BIND | PV_MS_RDONLY | PV_MS_NOSUID | PV_MS_NODEV, NULL))
        return fail(f, errno, "sealing the private root");
    return 0;
}

int view_build(struct options *o, struct failure *f)
{
    struct device devices[MAX_DEVICES] __attribute__((cleanup(close_devices))) = {0};
    size_t device_count = 0;

    if (!o->private_root)
        return 0;
    if (collect(o, f) || collect_devices(o, devices, &device_count, f))
        return -1;
    if (mount("hv-root", cover, "tmpfs", PV_MS_NOSUID | PV_MS_NODEV, "mode=0755,size=1m") || chdir(cover))
        return fail(f, errno, "mounting the private root");
    for (size_t i = 0; i < o->bind_count; i++)
        if (attach(&o->binds[i].tree, o->binds[i].path + strspn(o->binds[i].path, "/"), f))
            return -1;
    return build_dev(devices, device_count, o, f) ? -1 : turn(f);
}
