/* Reports to the agent: "P<pid>", "T" with the pty master beside it (SCM_RIGHTS), "E<exit code> <errno> <message>". */
#include "exec.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static void send_text(int socket, const char *text, size_t len)
{
    /* The agent may be gone with its client; there is nobody else to tell. */
    ssize_t ignored = send(socket, text, len, MSG_NOSIGNAL);

    (void)ignored;
}

void hv_report_pid(int socket, pid_t pid)
{
    char text[32];
    int len = snprintf(text, sizeof text, "P%d", (int)pid);

    send_text(socket, text, (size_t)len);
}

int hv_report_terminal(int socket, int master, int *err)
{
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(sizeof(int))];
    } control = {0};
    struct iovec data = {.iov_base = (char[]){'T'}, .iov_len = 1};
    struct msghdr message = {
        .msg_iov = &data, .msg_iovlen = 1, .msg_control = control.space, .msg_controllen = sizeof control.space};
    struct cmsghdr *rights = CMSG_FIRSTHDR(&message);

    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(rights), &master, sizeof master);
    if (sendmsg(socket, &message, MSG_NOSIGNAL) < 0) {
        *err = errno;
        return -1;
    }
    return 0;
}

void hv_report_error(int socket, int code, int error, const char *format, ...)
{
    char text[1024];
    size_t used = (size_t)snprintf(text, sizeof text, "E%d %d ", code, error);
    va_list args;
    int wrote;

    va_start(args, format);
    wrote = vsnprintf(text + used, sizeof text - used, format, args);
    va_end(args);
    if (wrote > 0)
        used += (size_t)wrote < sizeof text - used ? (size_t)wrote : sizeof text - used - 1;
    if (error) {
        wrote = snprintf(text + used, sizeof text - used, ": %s", strerror(error));
        if (wrote > 0)
            used += (size_t)wrote < sizeof text - used ? (size_t)wrote : sizeof text - used - 1;
    }
    send_text(socket, text, used);
}
