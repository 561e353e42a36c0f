/* hv-exec REQUEST_FD REPORT_FD      run a process in a container (exec.h has the theory of operation)
 * hv-exec pause REPORT_FD           start the process that holds a shared PID namespace (pause.c)
 */
#include "exec.h"

#include "clone.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

static int parse_fd(const char *text)
{
    char *end = NULL;
    long value = strtol(text, &end, 10);

    return *text && !*end && value > 2 && value < 1 << 20 ? (int)value : -1;
}

static int refuse(int report, int error, const char *what)
{
    hv_report_error(report, HV_EXEC_NOT_EXECUTABLE, error, "cannot %s", what);
    return 1;
}

static void reset_signals(void)
{
    sigset_t none;

    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    /* The agent ignores several: Python SIGPIPE and SIGXFSZ, PID 1 those that would end it. Ignored stays ignored
     * through execve, and Ctrl-C would do nothing. */
    for (int number = 1; number <= SIGRTMAX; number++)
        signal(number, SIG_DFL);
}

/* The child; returns an exit status only when it could not become the asked-for program. */
static int become(const struct hv_exec_request *request, const struct hv_filter *filter, int report)
{
    const char *what = "";
    int err = 0, code;

    if (hv_enter_namespaces(request, CLONE_NEWCGROUP, &err))
        return refuse(report, err, "join the container's cgroup namespace");
    setsid();
    if (request->tty && hv_terminal_open(request, report, &what, &err))
        return refuse(report, err, what);
    if (chdir(request->cwd)) {
        hv_report_error(report, HV_EXEC_NOT_EXECUTABLE, errno, "working directory \"%.512s\"", request->cwd);
        return HV_EXEC_NOT_EXECUTABLE;
    }
    if (hv_confine(request, filter, &what, &err))
        return refuse(report, err, what);
    reset_signals();
    hv_lookup_and_execute(request, &err);
    code = hv_exit_code_of(err);
    if (code == HV_EXEC_NOT_FOUND)
        hv_report_error(report, code, 0, "\"%.512s\": executable not found in the container", request->argv[0]);
    else
        hv_report_error(report, code, err, "\"%.512s\": cannot execute", request->argv[0]);
    return code;
}

static int open_cgroup(const char *path, int *cgroup)
{
    *cgroup = path ? open(path, O_PATH | O_DIRECTORY | O_CLOEXEC) : -1;
    return path && *cgroup < 0 ? -1 : 0;
}

static int prepare(int request_fd, int report, struct hv_exec_request *request, struct hv_filter *filter, int *cgroup)
{
    const char *what = "";
    int err = 0;

    if (hv_exec_request_read(request_fd, request, &err))
        return refuse(report, err, "read the request");
    if (request->seccomp && hv_filter_read(request->seccomp, filter, &err))
        return refuse(report, err, "read the container's seccomp filter (it may just have ended)");
    if (open_cgroup(request->cgroup, cgroup))
        return refuse(report, errno, "open the container's cgroup (it may just have ended)");
    if (hv_enter_limits(request, &what, &err))
        return refuse(report, err, what);
    if (hv_enter_keep_only((int[]){report, request->pidfd, *cgroup}, 3, &err))
        return refuse(report, err, "close descriptors");
    if ((request->pidfd < 0) != request->guest) /* a request that lost its container must not run beside it, with its rights */
        return refuse(report, EBADF, "join the container's namespaces (it may just have ended)");
    if (request->pidfd >= 0 && fcntl(request->pidfd, F_SETFD, FD_CLOEXEC))
        return refuse(report, errno, "use the container's pidfd");
    if (hv_enter_namespaces(request, ~CLONE_NEWCGROUP, &err))
        return refuse(report, err, "join the container's namespaces (it may just have ended)");
    return 0;
}

/* The child borrows our memory until it executes: copying pages, and moving a process between cgroups, cost milliseconds
 * under TCG. */
static int run(int request_fd, int report)
{
    struct hv_exec_request request;
    struct hv_filter filter = {0};
    int cgroup = -1;
    pid_t pid;

    if (prepare(request_fd, report, &request, &filter, &cgroup))
        return 1;
    pid = hv_clone_vfork(cgroup);
    if (pid < 0)
        return refuse(report, -pid, "start a process in the container");
    if (pid == 0)
        _exit(become(&request, &filter, report));
    hv_report_pid(report, pid);
    return 0;
}

int main(int argc, char **argv)
{
    int report = argc == 3 ? parse_fd(argv[2]) : -1;

    if (report < 0 || fcntl(report, F_SETFD, FD_CLOEXEC))
        return 2;
    prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
    if (!strcmp(argv[1], "pause"))
        return hv_pause(report);
    if (parse_fd(argv[1]) < 0)
        return 2;
    return run(parse_fd(argv[1]), report);
}
