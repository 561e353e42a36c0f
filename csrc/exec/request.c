/* The request: NUL-terminated records "key=value", one memfd full. The agent writes it (hypervisor/agent/exec_request.py).
 *
 *   pidfd=N (or guest=1: in no container)
 *   ns=N  cgroup=DIRECTORY  seccomp=PATH  cwd=PATH  uid=N  gid=N  groups=N,N,...  nnp=1  tty=COLUMNSxROWS
 *   caps=HEX,HEX,HEX,HEX,HEX (bounding, effective, permitted, inheritable, ambient)  oom=N  rlimit=RESOURCE,SOFT,HARD
 *   env=NAME=VALUE (any number)  arg=STRING (one at least)
 *
 * An unknown key, a number that is none, and a missing last NUL are EINVAL.
 */
#include "exec.h"

#include "../common/cleanup.h"

#include <string.h>
#include <sys/stat.h>

static int fail(int *err, int error)
{
    *err = error;
    return -1;
}

static int parse_number(const char **text, unsigned long long limit, int base, unsigned long long *out, int *err)
{
    char *end = NULL;

    if (**text == '-' || **text == '+' || **text == ' ' || **text == '\0')
        return fail(err, EINVAL);
    errno = 0;
    *out = strtoull(*text, &end, base);
    if (errno || end == *text || *out > limit)
        return fail(err, EINVAL);
    *text = end;
    return 0;
}

static int parse_whole(const char *text, unsigned long long limit, unsigned long long *out, int *err)
{
    if (parse_number(&text, limit, 10, out, err))
        return -1;
    return *text ? fail(err, EINVAL) : 0;
}

static int skip(const char **text, char separator, int *err)
{
    if (**text != separator)
        return fail(err, EINVAL);
    (*text)++;
    return 0;
}

static int parse_groups(const char *text, struct hv_exec_request *out, int *err)
{
    unsigned long long value;

    if (out->groups)
        return fail(err, EINVAL);
    out->groups = calloc(HV_EXEC_MAX_GROUPS, sizeof *out->groups);
    if (!out->groups)
        return fail(err, ENOMEM);
    while (*text) {
        if (out->group_count == HV_EXEC_MAX_GROUPS || (out->group_count && skip(&text, ',', err)) ||
            parse_number(&text, UINT32_MAX - 1, 10, &value, err))
            return fail(err, EINVAL);
        out->groups[out->group_count++] = (gid_t)value;
    }
    return 0;
}

static int parse_caps(const char *text, struct hv_exec_request *out, int *err)
{
    uint64_t *const sets[] = {&out->caps.bounding, &out->caps.effective, &out->caps.permitted, &out->caps.inheritable,
                              &out->caps.ambient};
    unsigned long long value;

    for (size_t i = 0; i < sizeof sets / sizeof *sets; i++) {
        if ((i && skip(&text, ',', err)) || parse_number(&text, UINT64_MAX, 16, &value, err))
            return -1;
        *sets[i] = value;
    }
    return *text ? fail(err, EINVAL) : 0;
}

static int parse_limit(const char *text, struct hv_exec_request *out, int *err)
{
    unsigned long long resource, soft, hard;

    if (out->limit_count == HV_EXEC_MAX_LIMITS || parse_number(&text, RLIM_NLIMITS - 1, 10, &resource, err) ||
        skip(&text, ',', err) || parse_number(&text, UINT64_MAX, 10, &soft, err) || skip(&text, ',', err) ||
        parse_whole(text, UINT64_MAX, &hard, err))
        return fail(err, EINVAL);
    out->limits[out->limit_count++] =
        (struct hv_exec_limit){.resource = (int)resource, .value = {.rlim_cur = soft, .rlim_max = hard}};
    return 0;
}

static int parse_tty(const char *text, struct hv_exec_request *out, int *err)
{
    unsigned long long columns, rows;

    if (parse_number(&text, UINT16_MAX, 10, &columns, err) || skip(&text, 'x', err) ||
        parse_whole(text, UINT16_MAX, &rows, err))
        return -1;
    out->tty = true;
    out->columns = (unsigned short)columns;
    out->rows = (unsigned short)rows;
    return 0;
}

static int parse_uint(const char *text, struct hv_exec_request *out, size_t offset, unsigned long long limit, int *err)
{
    unsigned long long value;

    if (parse_whole(text, limit, &value, err))
        return -1;
    *(unsigned int *)(void *)((char *)out + offset) = (unsigned int)value;
    return 0;
}

static int parse_flag(const char *text, bool *out, int *err)
{
    if (strcmp(text, "1") != 0)
        return fail(err, EINVAL);
    *out = true;
    return 0;
}

static int parse_record(char *key, char *value, struct hv_exec_request *out, int *err)
{
    if (!strcmp(key, "arg"))
        return out->argv[out->argc++] = value, 0;
    if (!strcmp(key, "env"))
        return out->envp[out->envc++] = value, 0;
    if (!strcmp(key, "cgroup"))
        return out->cgroup = value, 0;
    if (!strcmp(key, "seccomp"))
        return out->seccomp = value, 0;
    if (!strcmp(key, "cwd"))
        return out->cwd = value, 0;
    if (!strcmp(key, "oom"))
        return out->oom_score_adj = value, 0;
    if (!strcmp(key, "pidfd"))
        return parse_uint(value, out, offsetof(struct hv_exec_request, pidfd), 1 << 20, err);
    if (!strcmp(key, "ns"))
        return parse_uint(value, out, offsetof(struct hv_exec_request, namespaces), INT32_MAX, err);
    if (!strcmp(key, "uid"))
        return parse_uint(value, out, offsetof(struct hv_exec_request, uid), UINT32_MAX - 1, err);
    if (!strcmp(key, "gid"))
        return parse_uint(value, out, offsetof(struct hv_exec_request, gid), UINT32_MAX - 1, err);
    if (!strcmp(key, "groups"))
        return parse_groups(value, out, err);
    if (!strcmp(key, "caps"))
        return parse_caps(value, out, err);
    if (!strcmp(key, "rlimit"))
        return parse_limit(value, out, err);
    if (!strcmp(key, "tty"))
        return parse_tty(value, out, err);
    if (!strcmp(key, "guest"))
        return parse_flag(value, &out->guest, err);
    if (!strcmp(key, "nnp"))
        return parse_flag(value, &out->no_new_privs, err);
    return fail(err, EINVAL);
}

static int count_records(const char *text, size_t len, size_t *args, size_t *envs)
{
    *args = *envs = 0;
    if (!len || text[len - 1] != '\0')
        return -1;
    for (const char *p = text, *end = text + len; p < end; p += strlen(p) + 1) {
        *args += !strncmp(p, "arg=", 4);
        *envs += !strncmp(p, "env=", 4);
    }
    return *args && *args <= HV_EXEC_MAX_STRINGS && *envs <= HV_EXEC_MAX_STRINGS ? 0 : -1;
}

int hv_exec_request_parse(char *text, size_t len, struct hv_exec_request *out, int *err)
{
    size_t args, envs;

    *out = (struct hv_exec_request){.text = text, .text_len = len, .pidfd = -1, .cwd = "/"};
    if (count_records(text, len, &args, &envs))
        return fail(err, EINVAL);
    out->argv = calloc(args + 1, sizeof *out->argv);
    out->envp = calloc(envs + 1, sizeof *out->envp);
    if (!out->argv || !out->envp)
        return fail(err, ENOMEM);
    for (char *p = text, *next; p < text + len; p = next) {
        char *equals = strchr(p, '=');

        next = p + strlen(p) + 1;
        if (!equals)
            return fail(err, EINVAL);
        *equals = '\0';
        if (parse_record(p, equals + 1, out, err))
            return -1;
    }
    return 0;
}

int hv_exec_request_read(int fd, struct hv_exec_request *out, int *err)
{
    cleanup_free char *text = NULL;
    struct stat status;
    size_t have = 0, len;

    *out = (struct hv_exec_request){.pidfd = -1};
    if (fstat(fd, &status))
        return fail(err, errno);
    if (status.st_size <= 0 || status.st_size > HV_EXEC_MAX_REQUEST)
        return fail(err, E2BIG);
    len = (size_t)status.st_size;
    text = malloc(len);
    if (!text)
        return fail(err, ENOMEM);
    while (have < len) {
        ssize_t got = pread(fd, text + have, len - have, (off_t)have);

        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return fail(err, got ? errno : EINVAL);
        have += (size_t)got;
    }
    return hv_exec_request_parse(steal_pointer(&text), len, out, err);
}

void hv_exec_request_destroy(struct hv_exec_request *request)
{
    free(request->argv);
    free(request->envp);
    free(request->groups);
    free(request->text);
    *request = (struct hv_exec_request){.pidfd = -1};
}
