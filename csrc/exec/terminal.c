/* A pseudo-terminal of the container's own devpts, so that its name exists in the container's /dev/pts. */
#include "exec.h"

#include "../common/cleanup.h"

#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

/* The container may have put anything at this path: it must be the kernel's pty multiplexer (character device 5:2). */
static int open_master(int *err)
{
    cleanup_fd int fd = open("/dev/pts/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    struct stat status;

    if (fd < 0 || fstat(fd, &status)) {
        *err = errno;
        return -1;
    }
    if (!S_ISCHR(status.st_mode) || status.st_rdev != makedev(5, 2)) {
        *err = ENOTTY;
        return -1;
    }
    return steal_fd(&fd);
}

/* The slave by ioctl, not by name: the name is the container's to forge. */
static int open_slave(int master, int *err)
{
    int unlock = 0, fd = -1;

    if (ioctl(master, TIOCSPTLCK, &unlock) == 0)
        fd = ioctl(master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (fd < 0)
        *err = errno;
    return fd;
}

static int use_slave(const struct hv_exec_request *request, int slave)
{
    struct winsize size = {.ws_col = request->columns, .ws_row = request->rows};

    if (request->columns && request->rows && ioctl(slave, TIOCSWINSZ, &size))
        return -1;
    if (fchown(slave, request->uid, (gid_t)-1) || ioctl(slave, TIOCSCTTY, 0))
        return -1;
    for (int fd = 0; fd < 3; fd++)
        if (dup2(slave, fd) < 0)
            return -1;
    return 0;
}

int hv_terminal_open(const struct hv_exec_request *request, int report, const char **what, int *err)
{
    cleanup_fd int master = -1;
    cleanup_fd int slave = -1;

    *what = "open a terminal from the container's /dev/pts/ptmx";
    master = open_master(err);
    if (master < 0)
        return -1;
    slave = open_slave(master, err);
    if (slave < 0)
        return -1;
    *what = "make the terminal the controlling one";
    if (use_slave(request, slave)) {
        *err = errno;
        return -1;
    }
    *what = "hand the terminal over";
    return hv_report_terminal(report, master, err);
}
