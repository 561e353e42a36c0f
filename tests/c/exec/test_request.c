/* hv-exec's request parser: what the agent writes is understood, anything else is EINVAL and nothing is read beyond it. */
#include "exec/exec.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define CHECK(condition)                                                         \
    do {                                                                         \
        if (!(condition)) {                                                      \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);      \
            exit(1);                                                             \
        }                                                                        \
    } while (0)

#define TEXT(literal) literal, sizeof(literal)

static int parse(const char *text, size_t len, struct hv_exec_request *out, int *err)
{
    char *copy = malloc(len ? len : 1);

    CHECK(copy);
    memcpy(copy, text, len);
    return hv_exec_request_parse(copy, len, out, err);
}

static void test_whole(void)
{
    struct hv_exec_request r;
    int err = 0;

    CHECK(!parse(TEXT("pidfd=7\0ns=131072\0cgroup=/c\0seccomp=/s\0cwd=/w\0uid=1\0gid=2\0groups=3,4\0nnp=1\0tty=80x24\0"
                      "caps=1ffffffffff,a,b,c,d\0oom=-5\0rlimit=7,10,20\0env=A=b=c\0env=X=\0arg=prog\0arg="),
                 &r, &err));
    CHECK(r.pidfd == 7 && r.namespaces == 131072 && r.uid == 1 && r.gid == 2);
    CHECK(!strcmp(r.cgroup, "/c") && !strcmp(r.seccomp, "/s") && !strcmp(r.cwd, "/w") && !strcmp(r.oom_score_adj, "-5"));
    CHECK(r.group_count == 2 && r.groups[0] == 3 && r.groups[1] == 4);
    CHECK(r.no_new_privs && r.tty && r.columns == 80 && r.rows == 24);
    CHECK(r.caps.bounding == 0x1ffffffffff && r.caps.effective == 10 && r.caps.ambient == 13);
    CHECK(r.limit_count == 1 && r.limits[0].resource == 7 && r.limits[0].value.rlim_cur == 10 &&
          r.limits[0].value.rlim_max == 20);
    CHECK(r.argc == 2 && !strcmp(r.argv[0], "prog") && !strcmp(r.argv[1], "") && !r.argv[2]);
    CHECK(r.envc == 2 && !strcmp(r.envp[0], "A=b=c") && !strcmp(r.envp[1], "X=") && !r.envp[2]);
    hv_exec_request_destroy(&r);
}

static void test_refused(void)
{
    static const struct {
        const char *text;
        size_t len;
    } bad[] = {
        {"", 0},
        {"arg=x", 5}, /* no last NUL */
        {TEXT("uid=1")}, /* nothing to run */
        {TEXT("arg=x\0")}, /* an empty record */
        {TEXT("arg=x\0what=1")},
        {TEXT("arg=x\0uid=-1")},
        {TEXT("arg=x\0uid=4294967295")},
        {TEXT("arg=x\0uid=99999999999999999999")},
        {TEXT("arg=x\0uid=1x")},
        {TEXT("arg=x\0uid=")},
        {TEXT("arg=x\0pidfd=1048577")},
        {TEXT("arg=x\0ns=2147483648")},
        {TEXT("arg=x\0groups=1,,2")},
        {TEXT("arg=x\0groups=1;2")},
        {TEXT("arg=x\0groups=1\0groups=2")},
        {TEXT("arg=x\0caps=1,2,3,4")},
        {TEXT("arg=x\0caps=1,2,3,4,5,6")},
        {TEXT("arg=x\0rlimit=99,1,1")},
        {TEXT("arg=x\0rlimit=7,1")},
        {TEXT("arg=x\0tty=80")},
        {TEXT("arg=x\0tty=80x70000")},
        {TEXT("arg=x\0nnp=yes")},
    };

    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct hv_exec_request r;
        int err = 0;

        if (!parse(bad[i].text, bad[i].len, &r, &err) || err != EINVAL) {
            fprintf(stderr, "case %zu: err %d\n", i, err);
            exit(1);
        }
        hv_exec_request_destroy(&r);
    }
}

static void test_too_many(void)
{
    struct hv_exec_request r;
    char text[HV_EXEC_MAX_GROUPS * 2 + 32] = "groups=0";
    size_t len = strlen(text);
    int err = 0;

    for (int i = 0; i < HV_EXEC_MAX_GROUPS; i++, len += 2)
        memcpy(text + len, ",0", 2);
    memcpy(text + len, "\0arg=x", 7);
    CHECK(parse(text, len + 7, &r, &err) && err == EINVAL);
    hv_exec_request_destroy(&r);
}

static void test_file(void)
{
    struct hv_exec_request r;
    int err = 0, fd = memfd_create("request", MFD_CLOEXEC);

    CHECK(fd >= 0);
    CHECK(hv_exec_request_read(fd, &r, &err) && err == E2BIG); /* empty */
    CHECK(write(fd, TEXT("arg=x")) == 6);
    CHECK(!hv_exec_request_read(fd, &r, &err) && !strcmp(r.argv[0], "x"));
    hv_exec_request_destroy(&r);
    CHECK(!ftruncate(fd, HV_EXEC_MAX_REQUEST + 1));
    CHECK(hv_exec_request_read(fd, &r, &err) && err == E2BIG);
    close(fd);
    CHECK(hv_exec_request_read(fd, &r, &err) && err == EBADF);
}

static void test_keep_only(void)
{
    int err = 0, a = dup(1), b = dup(1), c = dup(1);

    CHECK(a > 2 && b > a && c > b);
    CHECK(!hv_enter_keep_only((int[]){b, 1}, 2, &err));
    CHECK(write(b, "", 0) == 0 && write(2, "", 0) == 0);
    CHECK(write(a, "", 0) < 0 && write(c, "", 0) < 0);
    CHECK(hv_enter_keep_only((int[9]){0}, 9, &err) && err == EINVAL);
    close(b);
}

static void test_codes(void)
{
    CHECK(hv_exit_code_of(ENOENT) == 127 && hv_exit_code_of(ENOTDIR) == 127);
    CHECK(hv_exit_code_of(EACCES) == 126 && hv_exit_code_of(ENOEXEC) == 126 && hv_exit_code_of(E2BIG) == 126);
}

int main(void)
{
    test_whole();
    test_refused();
    test_too_many();
    test_file();
    test_codes();
    test_keep_only(); /* last: closes what the sanitizers may have open */
    puts("6 passed, 0 failed");
    return 0;
}
