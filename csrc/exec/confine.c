/* CONFINED: what the new process may do, in crun's order (container.c, libcrun_set_caps and its callers):
 *
 *   without no_new_privs: seccomp first (loading a filter then needs CAP_SYS_ADMIN, which is about to go)
 *   bounding set, KEEPCAPS, groups, gid, uid, the other capability sets, ambient set
 *   with no_new_privs: the flag, and seccomp last, so that the filter sees as few of our own calls as possible
 */
#include "exec.h"

#include "../common/cleanup.h"

#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>

enum { MAX_FILTER = BPF_MAXINSNS * sizeof(struct sock_filter) };

int hv_filter_read(const char *path, struct hv_filter *out, int *err)
{
    cleanup_fd int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    struct stat status;

    if (fd < 0 || fstat(fd, &status)) {
        *err = errno;
        return -1;
    }
    if (status.st_size <= 0 || status.st_size > (off_t)MAX_FILTER || status.st_size % (off_t)sizeof(struct sock_filter)) {
        *err = EINVAL;
        return -1;
    }
    out->len = (size_t)status.st_size;
    out->code = malloc(out->len);
    if (!out->code || read(fd, out->code, out->len) != (ssize_t)out->len) {
        free(out->code);
        *out = (struct hv_filter){0};
        *err = EIO;
        return -1;
    }
    return 0;
}

static int load_filter(const struct hv_filter *filter)
{
    struct sock_fprog program = {
        .len = (unsigned short)(filter->len / sizeof(struct sock_filter)),
        .filter = filter->code,
    };

    if (!filter->code)
        return 0;
    return (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program);
}

static int drop_bounding(uint64_t keep)
{
    for (unsigned long cap = 0; cap < 64; cap++) {
        if (keep >> cap & 1)
            continue;
        if (prctl(PR_CAPBSET_DROP, cap, 0, 0, 0)) {
            if (errno == EINVAL) /* beyond the last one that this kernel knows */
                return 0;
            return -1;
        }
    }
    return 0;
}

static int set_ids(const struct hv_exec_request *request)
{
    if (prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0) || setgroups(request->group_count, request->groups) ||
        setresgid(request->gid, request->gid, request->gid) || setresuid(request->uid, request->uid, request->uid))
        return -1;
    return 0;
}

static int set_caps(const struct hv_exec_caps *caps)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2];

    for (int i = 0; i < 2; i++) {
        data[i].effective = (uint32_t)(caps->effective >> (32 * i));
        data[i].permitted = (uint32_t)(caps->permitted >> (32 * i));
        data[i].inheritable = (uint32_t)(caps->inheritable >> (32 * i));
    }
    return (int)syscall(SYS_capset, &header, data);
}

static int set_ambient(uint64_t ambient)
{
    if (prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0))
        return -1;
    for (unsigned long cap = 0; cap < 64; cap++)
        if ((ambient >> cap & 1) && prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, cap, 0, 0))
            return -1;
    return 0;
}

static int step(int result, const char *name, const char **what, int *err)
{
    if (result) {
        *what = name;
        *err = errno;
    }
    return result ? -1 : 0;
}

int hv_confine(const struct hv_exec_request *request, const struct hv_filter *filter, const char **what, int *err)
{
    if (!request->no_new_privs && step(load_filter(filter), "load the seccomp filter", what, err))
        return -1;
    if (step(drop_bounding(request->caps.bounding), "drop capabilities from the bounding set", what, err) ||
        step(set_ids(request), "set user and groups", what, err) ||
        step(set_caps(&request->caps), "set capabilities", what, err) ||
        step(set_ambient(request->caps.ambient), "set ambient capabilities", what, err))
        return -1;
    if (!request->no_new_privs)
        return 0;
    if (step(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "set no_new_privs", what, err))
        return -1;
    return step(load_filter(filter), "load the seccomp filter", what, err);
}
