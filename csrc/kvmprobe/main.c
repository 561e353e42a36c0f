/* hv-kvm-probe: does KVM on this machine run a guest? Answers by running one.
 *
 * A /dev/kvm that opens and answers is common where no ordinary guest runs: in nested clouds, and under hypervisors
 * that expect a guest kernel made for them. So a guest goes the way of every kernel: protected mode, long mode, paging
 * with its own fault handler, another address space, user mode, system call, timer interrupt; with loops that tell a
 * CPU from an emulator.
 *
 * Theory of operation: the guest runs in a child, because KVM_RUN may never return. The stage reached lies in shared
 * memory. The parent waits for the child with a time limit, kills it when that is over, and says where it was.
 *
 * Output: one line of JSON, {"usable": bool, "stage": number, "reason": text, "milliseconds": number}.
 * Exit code 0: usable, 1: not, 2: bad usage.
 */
#include "guest.h"
#include "machine.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { DEFAULT_TIMEOUT_MS = 3000, KILL_TIMEOUT_MS = 2000 };

struct answer {
    volatile int stage;
    bool finished; /* the child came to an end of its own, good or bad */
    bool usable;
    struct failure failure;
};

static const char *stage_name(int stage)
{
    static const char *const names[] = {
        "starting",
        "protected mode",
        "entering long mode",
        "CPUID, TSC and SSE in kernel mode",
        "a loop in kernel mode",
        "handling a page fault",
        "switching address spaces",
        "entering user mode",
        "a loop in user mode",
        "a timer interrupt in user mode",
        "leaving user mode",
    };

    return stage >= 0 && stage < (int)(sizeof names / sizeof *names) ? names[stage] : "an unknown step";
}

static double now_ms(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e3 + (double)now.tv_nsec / 1e6;
}

static void run_child(struct answer *answer)
{
    struct machine machine;

    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (machine_create(&machine, &answer->failure) == 0)
        answer->usable = machine_run(&machine, &answer->stage, &answer->failure) == 0;
    machine_destroy(&machine);
    answer->finished = true;
    exit(0);
}

/* Returns whether the child ended in time; it is reaped then. */
static bool wait_child(pid_t child, int pidfd, int timeout_ms)
{
    struct pollfd watch = {.fd = pidfd, .events = POLLIN};
    double end = now_ms() + timeout_ms;

    for (double left = timeout_ms; left > 0; left = end - now_ms()) {
        int ready = poll(&watch, 1, (int)left + 1);

        if (ready > 0)
            return waitpid(child, NULL, 0) == child;
        if (ready < 0 && errno != EINTR)
            return false;
    }
    return false;
}

/* Puts what is known into answer->failure in the words that the user will read. */
static void explain(struct answer *answer, bool in_time, int timeout_ms)
{
    struct failure *f = &answer->failure;
    char what[sizeof f->what];

    if (answer->finished && answer->usable) {
        snprintf(f->what, sizeof f->what, "a guest ran to user mode and back");
        return;
    }
    if (!in_time)
        snprintf(what, sizeof what, "no progress within %d ms", timeout_ms);
    else if (!answer->finished)
        snprintf(what, sizeof what, "the probe's process died");
    else
        snprintf(what, sizeof what, "%.150s%s%.80s", f->what, f->err ? ": " : "", f->err ? strerror(f->err) : "");
    if (answer->stage == 0 && answer->finished)
        snprintf(f->what, sizeof f->what, "%.250s", what);
    else
        snprintf(f->what, sizeof f->what, "guest stuck at %s: %.180s", stage_name(answer->stage + 1), what);
    answer->usable = false;
}

/* A time limit for the parent's own use, in milliseconds; -1: not a sensible number. */
static int parse_timeout(const char *text)
{
    char *end;
    long value;

    errno = 0;
    value = strtol(text, &end, 10);
    return errno || end == text || *end || value < 1 || value > 600000 ? -1 : (int)value;
}

static int probe(struct answer *answer, int timeout_ms)
{
    pid_t child = fork();
    int pidfd;
    bool in_time;

    if (child < 0)
        return -1;
    if (child == 0)
        run_child(answer);
    pidfd = (int)syscall(SYS_pidfd_open, child, 0);
    if (pidfd < 0) {
        kill(child, SIGKILL);
        return -1;
    }
    in_time = wait_child(child, pidfd, timeout_ms);
    if (!in_time) {
        kill(child, SIGKILL);
        /* Not for ever: a child that hangs in the kernel must not hang us. */
        wait_child(child, pidfd, KILL_TIMEOUT_MS);
    }
    close(pidfd);
    explain(answer, in_time, timeout_ms);
    return 0;
}

int main(int argc, char **argv)
{
    int timeout_ms = argc == 2 ? parse_timeout(argv[1]) : DEFAULT_TIMEOUT_MS;
    double begin = now_ms();
    struct answer *answer;

    if (argc > 2 || timeout_ms < 0) {
        fprintf(stderr, "usage: hv-kvm-probe [TIMEOUT_MS]\n");
        return 2;
    }
    answer = mmap(NULL, sizeof *answer, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (answer == MAP_FAILED || probe(answer, timeout_ms)) {
        fprintf(stderr, "hv-kvm-probe: %s\n", strerror(errno));
        return 2;
    }
    printf("{\"usable\": %s, \"stage\": %d, \"reason\": \"%s\", \"milliseconds\": %.1f}\n",
           answer->usable ? "true" : "false", answer->stage, answer->failure.what, now_ms() - begin);
    return answer->usable ? 0 : 1;
}
