#include "privileges.h"

#include "../common/cleanup.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <linux/capability.h>
#include <linux/securebits.h>
#include <stdint.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

static int write_text(const char *path, const char *text, struct failure *f)
{
    cleanup_fd int fd = open(path, O_WRONLY | O_CLOEXEC);

    if (fd < 0 || write(fd, text, strlen(text)) < 0)
        return fail(f, errno, "writing %s", path);
    return 0;
}

static int join_cgroups(const struct path_list *cgroups, struct failure *f)
{
    for (size_t i = 0; i < cgroups->count; i++) {
        char path[PATH_MAX];

        if ((size_t)snprintf(path, sizeof path, "%s/cgroup.procs", cgroups->items[i]) >= sizeof path)
            return fail(f, ENAMETOOLONG, "joining a cgroup");
        if (write_text(path, "0", f))
            return -1;
    }
    return 0;
}

/* Only ever lowers: a hard limit that is lower already stays, since raising it needs CAP_SYS_RESOURCE, which root in a
 * container often lacks, and a lower limit is no risk. */
static int apply_limit(const struct limit *limit, struct failure *f)
{
    struct rlimit value = limit->value;
    struct rlimit now;

    if (getrlimit(limit->resource, &now))
        return fail(f, errno, "reading limit %d", limit->resource);
    if (value.rlim_max > now.rlim_max)
        value.rlim_max = now.rlim_max;
    if (value.rlim_cur > value.rlim_max)
        value.rlim_cur = value.rlim_max;
    if (setrlimit(limit->resource, &value))
        return fail(f, errno, "setting limit %d", limit->resource);
    return 0;
}

int privileges_limit(const struct options *o, struct failure *f)
{
    char text[16];

    if (join_cgroups(&o->cgroups, f))
        return -1;
    for (size_t i = 0; i < o->limit_count; i++)
        if (apply_limit(&o->limits[i], f))
            return -1;
    if (!o->has_oom_score)
        return 0;
    snprintf(text, sizeof text, "%d", o->oom_score);
    return write_text("/proc/self/oom_score_adj", text, f);
}

/* The bounding set limits what any later execve could give back. */
static int drop_bounding_set(struct failure *f)
{
    unsigned long bits = SECBIT_NOROOT | SECBIT_NOROOT_LOCKED | SECBIT_NO_SETUID_FIXUP_LOCKED |
                         SECBIT_KEEP_CAPS_LOCKED | SECBIT_NO_CAP_AMBIENT_RAISE | SECBIT_NO_CAP_AMBIENT_RAISE_LOCKED;

    for (unsigned long capability = 0; capability < 64; capability++) {
        if (prctl(PR_CAPBSET_READ, capability, 0, 0, 0) < 0)
            break;
        if (prctl(PR_CAPBSET_DROP, capability, 0, 0, 0))
            return fail(f, errno, "dropping capability %lu", capability);
    }
    /* From here on not even user 0 has powers in this process and its children. */
    if (prctl(PR_SET_SECUREBITS, bits, 0, 0, 0))
        return fail(f, errno, "locking the secure bits");
    return 0;
}

static int become(const struct options *o, struct failure *f)
{
    if (setgroups(0, NULL))
        return fail(f, errno, "dropping the groups");
    if (setresgid(o->gid, o->gid, o->gid))
        return fail(f, errno, "becoming group %u", o->gid);
    if (setresuid(o->uid, o->uid, o->uid))
        return fail(f, errno, "becoming user %u", o->uid);
    return 0;
}

static int drop_capabilities(struct failure *f)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct none[2] = {0};

    if (syscall(SYS_capset, &header, none))
        return fail(f, errno, "dropping the capabilities");
    if (prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) && errno != EINVAL)
        return fail(f, errno, "dropping the ambient capabilities");
    return 0;
}

/* A clear sign of a bug is better refused than run: whoever could become root again is not confined. */
static int check_dropped(const struct options *o, struct failure *f)
{
    if (o->has_identity && (setuid(0) == 0 || setgid(0) == 0))
        return fail(f, EPERM, "root could be had again");
    return 0;
}

static bool may_drop_bounding_set(void)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct now[2] = {0};

    return syscall(SYS_capget, &header, now) == 0 && (now[0].effective & (1U << CAP_SETPCAP));
}

int privileges_drop(const struct options *o, struct failure *f)
{
    if (geteuid() == 0 && !o->has_identity)
        return fail(f, 0, "root must name a user to become: --uid and --gid");
    if (may_drop_bounding_set() && drop_bounding_set(f))
        return -1;
    if (o->has_identity && become(o, f))
        return -1;
    if (drop_capabilities(f))
        return -1;
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        return fail(f, errno, "forbidding new privileges");
    return check_dropped(o, f);
}

/* <linux/landlock.h> of Debian 12 knows neither networks nor scopes; the layout is the kernel's ABI. */
struct landlock_rules {
    uint64_t handled_access_fs;
    uint64_t handled_access_net;
    uint64_t scoped;
};
enum { LANDLOCK_MAKE_CHAR = 1 << 6, LANDLOCK_MAKE_BLOCK = 1 << 11, LANDLOCK_VERSION_QUERY = 1, LANDLOCK_SCOPES = 3 };

int landlock_enter(struct failure *f)
{
    struct landlock_rules rules = {.handled_access_fs = LANDLOCK_MAKE_CHAR | LANDLOCK_MAKE_BLOCK};
    long version = syscall(SYS_landlock_create_ruleset, NULL, 0, LANDLOCK_VERSION_QUERY);
    size_t size = version >= 6 ? sizeof rules : sizeof rules.handled_access_fs;
    cleanup_fd int fd = -1;

    if (version < 1)
        return 0;
    if (version >= 6)
        rules.scoped = LANDLOCK_SCOPES;
    fd = (int)syscall(SYS_landlock_create_ruleset, &rules, size, 0);
    if (fd < 0)
        return fail(f, errno, "making Landlock rules");
    if (syscall(SYS_landlock_restrict_self, fd, 0))
        return fail(f, errno, "entering a Landlock domain");
    return 0;
}
