/* The command line of hv-confine as a value: what to confine, how far, and what to execute then. */
#ifndef PV_CONFINE_OPTIONS_H
#define PV_CONFINE_OPTIONS_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/resource.h>
#include <sys/types.h>

/* Far above what a VM needs; a list that overflows is a caller's mistake and is refused. */
enum { CONFINE_MAX_LIST = 64 };

/* Errors: a call that fails returns -1 and fills a `struct failure`: the errno, and what was tried on what,
 * because "Permission denied" without the path helps nobody. err 0 means a mistake in the arguments. */
struct failure {
    int err;
    char what[512];
};

int fail(struct failure *f, int err, const char *format, ...) __attribute__((format(printf, 3, 4)));

struct path_list {
    const char *items[CONFINE_MAX_LIST];
    size_t count;
};

struct bind_mount {
    const char *path;
    bool writable;
    int tree; /* detached copy of the mount, open between view_open() and view_build(); -1 else */
};

struct limit {
    int resource;
    struct rlimit value;
};

struct options {
    bool has_identity;
    uid_t uid;
    gid_t gid;
    struct path_list cgroups;
    struct limit limits[CONFINE_MAX_LIST];
    size_t limit_count;
    bool private_root;
    bool user_namespace;
    bool new_network;
    bool filter;
    struct bind_mount binds[CONFINE_MAX_LIST];
    size_t bind_count;
    struct path_list devices; /* below /dev, without it */
    int stdio[3];             /* -1: keep what there is */
    int keep[CONFINE_MAX_LIST];
    size_t keep_count;
    const char *directory;
    bool has_oom_score;
    int oom_score;
    char *environment[CONFINE_MAX_LIST + 1];
    size_t environment_count;
    char **program;
};

/* Fills *o from argv. Pointers in it are argv's. A word not understood is an error; nothing was changed then. */
int options_parse(int argc, char **argv, struct options *o, struct failure *f);

/* What `--help` prints. */
extern const char options_help[];

#endif
