/* LIMITED and JOINED: what the child inherits from hv-exec. */
#include "exec.h"

#include "../common/cleanup.h"

#include <fcntl.h>
#include <limits.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>

static int write_file(const char *path, const char *text, int *err)
{
    cleanup_fd int fd = open(path, O_WRONLY | O_CLOEXEC | O_NOFOLLOW);

    if (fd < 0 || write(fd, text, strlen(text)) < 0) {
        *err = errno;
        return -1;
    }
    return 0;
}

int hv_enter_limits(const struct hv_exec_request *request, const char **what, int *err)
{
    *what = "set oom_score_adj";
    if (request->oom_score_adj && write_file("/proc/self/oom_score_adj", request->oom_score_adj, err))
        return -1;
    *what = "set resource limits";
    for (size_t i = 0; i < request->limit_count; i++) {
        if (setrlimit((__rlimit_resource_t)request->limits[i].resource, &request->limits[i].value)) {
            *err = errno;
            return -1;
        }
    }
    return 0;
}

int hv_enter_namespaces(const struct hv_exec_request *request, int which, int *err)
{
    if ((request->namespaces & which) && setns(request->pidfd, request->namespaces & which)) {
        *err = errno;
        return -1;
    }
    return 0;
}

static int compare(const void *a, const void *b)
{
    int x = *(const int *)a, y = *(const int *)b;

    return (x > y) - (x < y);
}

static int close_span(unsigned first, unsigned last, int *err)
{
    if (first > last || syscall(SYS_close_range, first, last, 0) == 0)
        return 0;
    *err = errno;
    return -1;
}

int hv_enter_keep_only(const int *keep, size_t count, int *err)
{
    int sorted[8];
    unsigned next = 3; /* the standard streams always stay */

    if (count > sizeof sorted / sizeof *sorted) {
        *err = EINVAL;
        return -1;
    }
    memcpy(sorted, keep, count * sizeof *keep);
    qsort(sorted, count, sizeof *sorted, compare);
    for (size_t i = 0; i < count; i++) {
        if (sorted[i] < (int)next)
            continue;
        if (close_span(next, (unsigned)sorted[i] - 1, err))
            return -1;
        next = (unsigned)sorted[i] + 1;
    }
    return close_span(next, UINT_MAX, err);
}
