/* hv-confine: executes a VM's process (QEMU) so that taking it over wins little. See docs/confinement.md.
 *
 * Theory of operation, in this order because each step needs what a later one takes away:
 *   stdio        so that every later complaint lands in the VM's own log
 *   limit        cgroups, resource limits, OOM score (need the host's /sys and /proc)
 *   unshare      new namespaces
 *   build        the private root, and no way back to the old one
 *   descriptors  session of its own; all but the listed descriptors closed (also those of the old root)
 *   drop         user, groups, capabilities, no new privileges
 *   landlock     a domain of its own
 *   filter       last: it denies what the steps above use
 *   execve
 * Any step that fails ends the program with 125 and one line; the VM's program has then not run.
 */
#include "options.h"
#include "privileges.h"
#include "view.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { EXIT_NOT_CONFINED = 125 };

/* The given numbers may be 0-2 themselves, so all are moved away before any is put in its place. */
static int place_stdio(const int given[3], struct failure *f)
{
    int moved[3] = {-1, -1, -1};

    for (int i = 0; i < 3; i++) {
        if (given[i] < 0)
            continue;
        moved[i] = fcntl(given[i], F_DUPFD_CLOEXEC, 3);
        if (moved[i] < 0)
            return fail(f, errno, "using descriptor %d", given[i]);
    }
    for (int i = 0; i < 3; i++)
        if (moved[i] >= 0 && dup2(moved[i], i) < 0)
            return fail(f, errno, "placing descriptor %d", i);
    return 0;
}

static int compare_int(const void *a, const void *b)
{
    int left = *(const int *)a;
    int right = *(const int *)b;

    return (left > right) - (left < right);
}

static int close_range_of(unsigned first, unsigned last, struct failure *f)
{
    if (first <= last && syscall(SYS_close_range, first, last, 0))
        return fail(f, errno, "closing descriptors %u-%u", first, last);
    return 0;
}

/* Closes the gaps between the descriptors to keep. */
static int close_others(struct options *o, struct failure *f)
{
    unsigned next = 3;

    qsort(o->keep, o->keep_count, sizeof *o->keep, compare_int);
    for (size_t i = 0; i < o->keep_count; i++) {
        int fd = o->keep[i];

        if (fcntl(fd, F_SETFD, 0))
            return fail(f, errno, "keeping descriptor %d", fd);
        if (close_range_of(next, (unsigned)fd - 1, f))
            return -1;
        next = (unsigned)fd + 1;
    }
    return close_range_of(next, UINT_MAX, f);
}

static int detach(struct options *o, struct failure *f)
{
    if (setsid() < 0 && getsid(0) != getpid())
        return fail(f, errno, "making a session");
    umask(077);
    if (close_others(o, f))
        return -1;
    if (chdir(o->directory))
        return fail(f, errno, "entering %s", o->directory);
    return 0;
}

static int confine(struct options *o, struct failure *f)
{
    if (privileges_limit(o, f) || view_unshare(o, f) || view_build(o, f))
        return -1;
    if (detach(o, f) || privileges_drop(o, f) || landlock_enter(f))
        return -1;
    return o->filter ? filter_install(f) : 0;
}

static int complain(const struct failure *f)
{
    if (f->err)
        dprintf(STDERR_FILENO, "hv-confine: %s: %s\n", f->what, strerror(f->err));
    else
        dprintf(STDERR_FILENO, "hv-confine: %s\n", f->what);
    return EXIT_NOT_CONFINED;
}

int main(int argc, char **argv)
{
    struct options options;
    struct failure failure;

    if (argc == 2 && strcmp(argv[1], "--help") == 0)
        return fputs(options_help, stdout) < 0;
    if (options_parse(argc, argv, &options, &failure))
        return complain(&failure);
    if (place_stdio(options.stdio, &failure) || confine(&options, &failure))
        return complain(&failure);
    execve(options.program[0], options.program, options.environment);
    fail(&failure, errno, "executing %s", options.program[0]);
    return complain(&failure);
}
