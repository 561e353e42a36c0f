/* hv-exec: puts a new process into a container that runs already, and gets out of the way.
 *
 * Theory of operation
 * -------------------
 * The agent (PID 1 of the guest) spawns hv-exec with three standard streams, a *request* (a memfd of NUL-terminated
 * records, see request.c) and a *report* socket (SOCK_SEQPACKET, see report.c). hv-exec then goes through these states:
 *
 *   READ      the request is parsed, the seccomp filter is read; nothing has changed yet
 *   LIMITED   oom_score_adj and resource limits are set: they are inherited by the child
 *   JOINED    one setns() by pidfd: mount and pid namespaces; root and cwd are the container's from here on
 *   FORKED    clone3(CLONE_PARENT | CLONE_INTO_CGROUP): the child is the *agent's* child, so that the agent sees the exact
 *             wait status, and is born in the container's cgroup. It borrows our memory (vfork); once it has executed or
 *             failed, hv-exec reports its pid and exits
 *   (child)
 *   HOME      the cgroup namespace, which hv-exec itself could not be in while it named a cgroup outside of it
 *   SESSION   setsid(); with a terminal: a pty from the container's own devpts, its master sent to the agent
 *   CONFINED  seccomp and capabilities, user and groups, no_new_privs: in crun's order
 *   EXECUTED  execve(); the report socket closes by itself, which tells the agent that all went well
 *
 * Nothing of the container's file system is trusted: before JOINED nothing in it is opened, after JOINED every path
 * is resolved by the kernel inside the container's own mount namespace and root, and what is opened there (ptmx) is
 * checked for what it is. Every other descriptor is closed before JOINED; the process is undumpable until execve().
 *
 * Errors: functions return 0 or -1 and set `*err` to an errno; the caller reports it once (report.c) and exits.
 */
#ifndef HV_EXEC_H
#define HV_EXEC_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/resource.h>
#include <sys/types.h>

enum {
    HV_EXEC_MAX_REQUEST = 8 << 20, /* bytes of a request */
    HV_EXEC_MAX_STRINGS = 1 << 17, /* arguments, and variables, at most */
    HV_EXEC_MAX_GROUPS = 1024,
    HV_EXEC_MAX_LIMITS = 32,
    HV_EXEC_NOT_EXECUTABLE = 126, /* exit codes of a shell, which the agent passes on */
    HV_EXEC_NOT_FOUND = 127,
};

struct hv_exec_limit {
    int resource;
    struct rlimit value;
};

struct hv_exec_caps {
    uint64_t bounding, effective, permitted, inheritable, ambient;
};

/* What the agent asks for. Strings point into `text`, which the request owns. */
struct hv_exec_request {
    char *text;
    size_t text_len;
    char **argv, **envp; /* NULL-terminated; owned */
    size_t argc, envc;
    gid_t *groups; /* owned */
    size_t group_count;
    struct hv_exec_limit limits[HV_EXEC_MAX_LIMITS];
    size_t limit_count;
    struct hv_exec_caps caps;
    uid_t uid;
    gid_t gid;
    int pidfd;          /* the container's first process; -1: none, which `guest` must say, too */
    int namespaces;     /* CLONE_NEW* flags to join; 0 without a pidfd */
    const char *cgroup; /* the cgroup's directory, or NULL */
    const char *seccomp; /* path of the compiled filter, or NULL */
    const char *cwd;
    const char *oom_score_adj; /* or NULL: as it is */
    bool guest; /* asked for by name: a process of the guest's own, in no container */
    bool no_new_privs;
    bool tty;
    unsigned short columns, rows;
};

/* request.c */
int hv_exec_request_read(int fd, struct hv_exec_request *out, int *err);
int hv_exec_request_parse(char *text, size_t len, struct hv_exec_request *out, int *err); /* takes `text` over */
void hv_exec_request_destroy(struct hv_exec_request *request);

/* report.c: messages on the report socket; each one datagram. Never block for long, never fail loudly. */
void hv_report_pid(int socket, pid_t pid);
int hv_report_terminal(int socket, int master, int *err);
void hv_report_error(int socket, int code, int error, const char *format, ...) __attribute__((format(printf, 4, 5)));

/* enter.c */
struct hv_filter {
    void *code;
    size_t len;
};
int hv_enter_limits(const struct hv_exec_request *request, const char **what, int *err);
int hv_enter_namespaces(const struct hv_exec_request *request, int which, int *err); /* of those asked for */
int hv_enter_keep_only(const int *keep, size_t count, int *err);

/* confine.c */
int hv_filter_read(const char *path, struct hv_filter *out, int *err);
int hv_confine(const struct hv_exec_request *request, const struct hv_filter *filter, const char **what, int *err);

/* terminal.c */
int hv_terminal_open(const struct hv_exec_request *request, int report, const char **what, int *err);

/* lookup.c */
int hv_lookup_and_execute(const struct hv_exec_request *request, int *err); /* returns only on failure, -1 */
int hv_exit_code_of(int error);

/* pause.c */
int hv_pause(int report);

#endif
