/* hv-exec REQUEST_FD REPORT_FD      run a process in a container (exec.h has the theory of operation)
 * hv-exec pause REPORT_FD           start the process that holds a shared PID namespace (pause.c)
 */
#include "exec.h"

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

static int prepare(int request_fd, int report, struct hv_exec_request *request, struct hv_filter *filter)
{
    const char *what = "";
    int err = 0;

    if (hv_exec_request_read(request_fd, request, &err))
        return refuse(report, err, "read the request");
    if (request->seccomp && hv_filter_read(request->seccomp, filter, &err))
        return refuse(report, err, "read the container's seccomp filter");
    if (hv_enter_limits(request, &what, &err))
        return refuse(report, err, what);
    if (hv_enter_keep_only((int[]){report, request->pidfd}, 2, &err))
        return refuse(report, err, "close descriptors");
    if (hv_enter_namespaces(request, &err))
        return refuse(report, err, "join the container's namespaces (it may just have ended)");
    return 0;
}

struct child {
    struct hv_exec_request request;
    struct hv_filter filter;
    int report;
};

static int child_main(void *argument)
{
    const struct child *child = argument;

    return become(&child->request, &child->filter, child->report);
}

/* CLONE_VM and CLONE_VFORK: the child borrows our memory until it executes, so no page is copied (1 ms under TCG). */
static int run(int request_fd, int report)
{
    static char stack[256 << 10] __attribute__((aligned(16)));
    struct child child = {.report = report};
    pid_t pid;

    if (prepare(request_fd, report, &child.request, &child.filter))
        return 1;
    close(child.request.pidfd);
    pid = clone(child_main, stack + sizeof(stack), CLONE_VM | CLONE_VFORK | CLONE_PARENT | SIGCHLD, &child);
    if (pid < 0)
        return refuse(report, errno, "start a process in the container");
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
