#include "options.h"

#include <errno.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char options_help[] =
    "usage: hv-confine [OPTION...] -- PROGRAM [ARG...]\n"
    "Executes PROGRAM confined. Exit code 125: it could not be, and standard error says why in one line.\n"
    "\n"
    "  --uid N --gid N        become this user and group, with no other groups (both, or neither; never 0)\n"
    "  --cgroup DIR           join this cgroup first (repeat for the controllers of cgroup v1)\n"
    "  --rlimit NAME=N[:N]    soft and hard limit: as, core, cpu, data, fsize, memlock, nofile,\n"
    "                         nproc, stack; N or 'unlimited'\n"
    "  --oom-score-adj N      -1000..1000\n"
    "  --private-root         a mount namespace that holds only what is named below; own IPC and UTS\n"
    "  --user-namespace       make those without being root (needs --private-root or --new-network)\n"
    "  --ro PATH, --rw PATH   show this file or directory at the same path, read-only or writable\n"
    "  --dev NAME             a device below /dev, beside null, zero and urandom: kvm, vhost-vsock, net/tun,\n"
    "                         userfaultfd\n"
    "  --new-network          a network namespace with nothing in it\n"
    "  --filter               seccomp filter: no mounts, namespaces, tracing, foreign memory, keys, modules, BPF\n"
    "  --stdin FD, --stdout FD, --stderr FD   use these descriptors\n"
    "  --keep-fd N            leave this descriptor open; all others from 3 on are closed\n"
    "  --chdir DIR            working directory, as the program will see it (default /)\n"
    "  --env NAME=VALUE       the program's environment holds only these\n";

int fail(struct failure *f, int err, const char *format, ...)
{
    va_list arguments;

    f->err = err;
    va_start(arguments, format);
    vsnprintf(f->what, sizeof f->what, format, arguments);
    va_end(arguments);
    return -1;
}

static int parse_number(const char *option, const char *text, long long low, long long high, long long *out,
                        struct failure *f)
{
    char *end;
    long long value;

    errno = 0;
    value = strtoll(text, &end, 10);
    if (errno || end == text || *end || value < low || value > high)
        return fail(f, 0, "%s wants a number from %lld to %lld, not '%s'", option, low, high, text);
    *out = value;
    return 0;
}

static int parse_int(const char *option, const char *text, long long low, long long high, int *out, struct failure *f)
{
    long long value;

    if (parse_number(option, text, low, high, &value, f))
        return -1;
    *out = (int)value;
    return 0;
}

static int parse_limit_value(const char *text, rlim_t *out, struct failure *f)
{
    long long value;

    if (strcmp(text, "unlimited") == 0) {
        *out = RLIM_INFINITY;
        return 0;
    }
    if (parse_number("--rlimit", text, 0, LLONG_MAX, &value, f))
        return -1;
    *out = (rlim_t)value;
    return 0;
}

static int limit_by_name(const char *name, size_t length, int *resource)
{
    static const struct {
        const char *name;
        int resource;
    } known[] = {
        {"as", RLIMIT_AS},       {"core", RLIMIT_CORE},       {"cpu", RLIMIT_CPU},
        {"data", RLIMIT_DATA},   {"fsize", RLIMIT_FSIZE},     {"memlock", RLIMIT_MEMLOCK},
        {"nofile", RLIMIT_NOFILE}, {"nproc", RLIMIT_NPROC},   {"stack", RLIMIT_STACK},
    };

    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (strlen(known[i].name) == length && strncmp(known[i].name, name, length) == 0) {
            *resource = known[i].resource;
            return 0;
        }
    return -1;
}

static int parse_limit(const char *text, struct limit *out, struct failure *f)
{
    const char *equals = strchr(text, '=');
    char soft[32];
    const char *colon;

    if (!equals || limit_by_name(text, (size_t)(equals - text), &out->resource))
        return fail(f, 0, "--rlimit wants NAME=SOFT[:HARD] with a known NAME, not '%s'", text);
    colon = strchr(equals, ':');
    if (!colon) {
        if (parse_limit_value(equals + 1, &out->value.rlim_cur, f))
            return -1;
        out->value.rlim_max = out->value.rlim_cur;
        return 0;
    }
    if ((size_t)(colon - equals) > sizeof soft)
        return fail(f, 0, "--rlimit %s: the soft limit is no number", text);
    snprintf(soft, sizeof soft, "%.*s", (int)(colon - equals - 1), equals + 1);
    if (parse_limit_value(soft, &out->value.rlim_cur, f) || parse_limit_value(colon + 1, &out->value.rlim_max, f))
        return -1;
    if (out->value.rlim_cur > out->value.rlim_max)
        return fail(f, 0, "--rlimit %s: the soft limit is above the hard one", text);
    return 0;
}

/* A path that is made below the new root must not climb out of it. */
static int check_path(const char *option, const char *path, struct failure *f)
{
    if (path[0] != '/' || strlen(path) >= PATH_MAX)
        return fail(f, 0, "%s wants an absolute path, not '%.200s'", option, path);
    for (const char *p = path; (p = strstr(p, "/..")); p += 3)
        if (p[3] == '/' || p[3] == '\0')
            return fail(f, 0, "%s: '..' is not allowed in '%.200s'", option, path);
    return 0;
}

static int add_path(const char *option, const char *path, struct path_list *list, struct failure *f)
{
    if (list->count == CONFINE_MAX_LIST)
        return fail(f, 0, "%s: more than %d of them", option, CONFINE_MAX_LIST);
    list->items[list->count++] = path;
    return 0;
}

static int add_bind(const char *option, const char *path, bool writable, struct options *o, struct failure *f)
{
    if (check_path(option, path, f))
        return -1;
    if (strspn(path, "/") == strlen(path))
        return fail(f, 0, "%s: the whole root cannot be shown", option);
    if (o->bind_count == CONFINE_MAX_LIST)
        return fail(f, 0, "%s: more than %d paths", option, CONFINE_MAX_LIST);
    o->binds[o->bind_count++] = (struct bind_mount){.path = path, .writable = writable, .tree = -1};
    return 0;
}

static int add_device(const char *name, struct options *o, struct failure *f)
{
    static const char *const allowed[] = {"kvm", "vhost-vsock", "net/tun", "userfaultfd"};

    for (size_t i = 0; i < sizeof allowed / sizeof *allowed; i++)
        if (strcmp(name, allowed[i]) == 0)
            return add_path("--dev", allowed[i], &o->devices, f);
    return fail(f, 0, "--dev: '%s' is none of kvm, vhost-vsock, net/tun, userfaultfd", name);
}

static int parse_cgroup(const char *value, struct options *o, struct failure *f)
{
    return check_path("--cgroup", value, f) ? -1 : add_path("--cgroup", value, &o->cgroups, f);
}

static int parse_id(const char *option, const char *value, unsigned *out, struct failure *f)
{
    long long id;

    /* 0 would be root, and 4294967295 means "leave it" to setresuid(). */
    if (parse_number(option, value, 1, 4294967294LL, &id, f))
        return -1;
    *out = (unsigned)id;
    return 0;
}

static int parse_keep(const char *value, struct options *o, struct failure *f)
{
    if (o->keep_count == CONFINE_MAX_LIST)
        return fail(f, 0, "--keep-fd: more than %d of them", CONFINE_MAX_LIST);
    return parse_int("--keep-fd", value, 3, INT_MAX, &o->keep[o->keep_count++], f);
}

static int parse_environment(char *value, struct options *o, struct failure *f)
{
    if (!strchr(value, '=') || value[0] == '=')
        return fail(f, 0, "--env wants NAME=VALUE, not '%.100s'", value);
    if (o->environment_count == CONFINE_MAX_LIST)
        return fail(f, 0, "--env: more than %d of them", CONFINE_MAX_LIST);
    o->environment[o->environment_count++] = value;
    return 0;
}

static int parse_rlimit(const char *value, struct options *o, struct failure *f)
{
    if (o->limit_count == CONFINE_MAX_LIST)
        return fail(f, 0, "--rlimit: more than %d of them", CONFINE_MAX_LIST);
    return parse_limit(value, &o->limits[o->limit_count++], f);
}

static bool parse_flag(const char *name, struct options *o)
{
    const struct {
        const char *name;
        bool *flag;
    } flags[] = {
        {"--private-root", &o->private_root},
        {"--user-namespace", &o->user_namespace},
        {"--new-network", &o->new_network},
        {"--filter", &o->filter},
    };

    for (size_t i = 0; i < sizeof flags / sizeof *flags; i++)
        if (strcmp(name, flags[i].name) == 0)
            return *flags[i].flag = true;
    return false;
}

static int parse_valued(const char *name, char *value, struct options *o, struct failure *f)
{
    if (strcmp(name, "--uid") == 0)
        return parse_id(name, value, &o->uid, f);
    if (strcmp(name, "--gid") == 0)
        return parse_id(name, value, &o->gid, f);
    if (strcmp(name, "--cgroup") == 0)
        return parse_cgroup(value, o, f);
    if (strcmp(name, "--rlimit") == 0)
        return parse_rlimit(value, o, f);
    if (strcmp(name, "--oom-score-adj") == 0) {
        o->has_oom_score = true;
        return parse_int(name, value, -1000, 1000, &o->oom_score, f);
    }
    if (strcmp(name, "--ro") == 0 || strcmp(name, "--rw") == 0)
        return add_bind(name, value, name[3] == 'w', o, f);
    if (strcmp(name, "--dev") == 0)
        return add_device(value, o, f);
    if (strcmp(name, "--stdin") == 0)
        return parse_int(name, value, 0, INT_MAX, &o->stdio[0], f);
    if (strcmp(name, "--stdout") == 0)
        return parse_int(name, value, 0, INT_MAX, &o->stdio[1], f);
    if (strcmp(name, "--stderr") == 0)
        return parse_int(name, value, 0, INT_MAX, &o->stdio[2], f);
    if (strcmp(name, "--keep-fd") == 0)
        return parse_keep(value, o, f);
    if (strcmp(name, "--chdir") == 0) {
        o->directory = value;
        return check_path(name, value, f);
    }
    if (strcmp(name, "--env") == 0)
        return parse_environment(value, o, f);
    return fail(f, 0, "unknown option '%.100s'", name);
}

/* What no single option can see. */
static int check_together(const struct options *o, struct failure *f)
{
    if (!o->program || !o->program[0])
        return fail(f, 0, "no program: '--' and a program must follow the options");
    if (o->program[0][0] != '/')
        return fail(f, 0, "the program must be an absolute path, not '%.200s'", o->program[0]);
    if ((o->uid == 0) != (o->gid == 0))
        return fail(f, 0, "--uid and --gid belong together");
    if (o->user_namespace && o->has_identity)
        return fail(f, 0, "--user-namespace maps only the caller's own user; it excludes --uid");
    if (o->user_namespace && !o->private_root && !o->new_network)
        return fail(f, 0, "--user-namespace needs --private-root or --new-network");
    if (!o->private_root && (o->bind_count || o->devices.count))
        return fail(f, 0, "--ro, --rw and --dev need --private-root");
    return 0;
}

int options_parse(int argc, char **argv, struct options *o, struct failure *f)
{
    int i = 1;

    *o = (struct options){.stdio = {-1, -1, -1}, .directory = "/"};
    for (; i < argc && strcmp(argv[i], "--") != 0; i++) {
        if (parse_flag(argv[i], o))
            continue;
        if (i + 1 == argc)
            return fail(f, 0, "option '%.100s' is unknown or lacks its value", argv[i]);
        if (parse_valued(argv[i], argv[i + 1], o, f))
            return -1;
        i++;
    }
    if (i < argc)
        o->program = &argv[i + 1];
    o->has_identity = o->uid != 0 && o->gid != 0;
    return check_together(o, f);
}
