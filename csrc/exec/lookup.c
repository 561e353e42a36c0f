/* EXECUTED: the program, found as a shell would: with a slash as it is, else along the container's own PATH. */
#include "exec.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define DEFAULT_PATH "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

int hv_exit_code_of(int error)
{
    return error == ENOENT || error == ENOTDIR ? HV_EXEC_NOT_FOUND : HV_EXEC_NOT_EXECUTABLE;
}

static const char *search_path(const struct hv_exec_request *request)
{
    for (char **p = request->envp; *p; p++)
        if (!strncmp(*p, "PATH=", 5))
            return *p + 5;
    return DEFAULT_PATH;
}

/* execve() says ENOENT also for a missing interpreter, EACCES also for a directory: tell those apart. */
static int execute(const char *path, const struct hv_exec_request *request)
{
    struct stat status;
    int error;

    execve(path, request->argv, request->envp);
    error = errno;
    if (error == ENOENT && !stat(path, &status))
        return ELIBBAD;
    if (error == EACCES && !stat(path, &status) && S_ISDIR(status.st_mode))
        return EISDIR;
    return error;
}

static int try_directory(const char *directory, size_t len, const struct hv_exec_request *request)
{
    char path[PATH_MAX];
    int wrote = snprintf(path, sizeof path, "%.*s%s%s", (int)len, directory, len ? "/" : "", request->argv[0]);

    if (wrote < 0 || (size_t)wrote >= sizeof path)
        return ENOENT;
    return execute(path, request);
}

int hv_lookup_and_execute(const struct hv_exec_request *request, int *err)
{
    int best = ENOENT;

    if (!*request->argv[0]) {
        *err = ENOENT;
        return -1;
    }
    if (strchr(request->argv[0], '/')) {
        *err = execute(request->argv[0], request);
        return -1;
    }
    for (const char *p = search_path(request); p; p = strchr(p, ':') ? strchr(p, ':') + 1 : NULL) {
        size_t len = strcspn(p, ":");
        int error = len < PATH_MAX ? try_directory(p, len, request) : ENOENT;

        if (error != ENOENT && error != ENOTDIR && error != EACCES && error != EISDIR) {
            *err = error;
            return -1;
        }
        if (error == EACCES) /* go on looking, as execvp() does, but remember it */
            best = EACCES;
    }
    *err = best;
    return -1;
}
