/* The first process of a PID namespace that the containers of a pod share: holds it open, reaps its orphans.
 *
 * It owns nothing: an empty root, no descriptor, no capability, the user nobody.
 */
#include "exec.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { NOBODY = 65534 };

static int drop_everything(void)
{
    int ignored;

    prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
    setsid();
    if (chroot("/run/podvisor/empty") || chdir("/"))
        return -1;
    if (syscall(SYS_setgroups, 0, NULL) || setresgid(NOBODY, NOBODY, NOBODY) || setresuid(NOBODY, NOBODY, NOBODY))
        return -1;
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    for (int fd = 0; fd < 3; fd++)
        close(fd);
    return hv_enter_keep_only(NULL, 0, &ignored);
}

static _Noreturn void reap_for_ever(void)
{
    sigset_t children;

    sigemptyset(&children);
    sigaddset(&children, SIGCHLD);
    sigprocmask(SIG_BLOCK, &children, NULL);
    for (;;) {
        while (waitpid(-1, NULL, WNOHANG) > 0)
            ;
        sigwaitinfo(&children, NULL);
    }
}

int hv_pause(int report)
{
    pid_t pid;

    if (unshare(CLONE_NEWPID)) {
        hv_report_error(report, HV_EXEC_NOT_EXECUTABLE, errno, "make a PID namespace");
        return 1;
    }
    pid = (pid_t)syscall(SYS_clone, CLONE_PARENT | SIGCHLD, NULL, NULL, NULL, 0);
    if (pid < 0) {
        hv_report_error(report, HV_EXEC_NOT_EXECUTABLE, errno, "start the pause process");
        return 1;
    }
    if (pid == 0) {
        if (drop_everything())
            _exit(1);
        reap_for_ever();
    }
    hv_report_pid(report, pid);
    return 0;
}
