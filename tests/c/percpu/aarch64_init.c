/* PID 1 of the guest in which aarch64.sh runs the tests: one after the other, then off. */
#include <stdio.h>
#include <stdlib.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/wait.h>
#include <unistd.h>

static char *const TESTS[][4] = {
    {"/area"},
    {"/break"},
    {"/adds", "20000000"},
    {"/ring"},
    {"/inject-ring"},
    {"/magazine"},
    {"/trace"},
    {"/context"},
    {"/alias"},
    {"/face"},
    {"/norseq", "/area"},
};

static int run(char *const *arguments)
{
    pid_t pid = fork();
    int status = 1;

    if (pid == 0) {
        execv(arguments[0], arguments);
        _exit(127);
    }
    return waitpid(pid, &status, 0) == pid ? status : 1;
}

int main(void)
{
    int failed = 0;

    setvbuf(stdout, NULL, _IONBF, 0);
    if (mount("proc", "/proc", "proc", 0, NULL) || mount("sysfs", "/sys", "sysfs", 0, NULL))
        perror("mount");
    for (unsigned i = 0; i < sizeof TESTS / sizeof *TESTS; i++) {
        int status = run(TESTS[i]);

        printf("== %s: %s (status %d)\n", TESTS[i][0], status ? "FAILED" : "passed", status);
        failed += status != 0;
    }
    if (failed)
        printf("%d failed\n", failed);
    else
        printf("all passed\n");
    sync();
    reboot(RB_POWER_OFF);
    return 0;
}
