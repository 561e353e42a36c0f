/* Scope-exit clean-up: a variable marked with one of these releases what it holds on every way out of its scope.
 *
 * Usage:  cleanup_fd int fd = open(...);   ...   return steal_fd(&fd);   (steal: keep it beyond the scope)
 * Source of the idiom: crun's utils.h and nbdkit's cleanup.h; the GCC/clang `cleanup` variable attribute.
 */
#ifndef PV_CLEANUP_H
#define PV_CLEANUP_H

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static inline void pv_cleanup_fd(int *fd)
{
    int saved = errno;

    if (*fd >= 0)
        close(*fd);
    errno = saved;
}

static inline void pv_cleanup_free(void *pointer)
{
    free(*(void **)pointer);
}

static inline void pv_cleanup_file(FILE **file)
{
    int saved = errno;

    if (*file)
        fclose(*file);
    errno = saved;
}

static inline void pv_cleanup_dir(DIR **dir)
{
    int saved = errno;

    if (*dir)
        closedir(*dir);
    errno = saved;
}

#define cleanup_fd __attribute__((cleanup(pv_cleanup_fd)))
#define cleanup_free __attribute__((cleanup(pv_cleanup_free)))
#define cleanup_file __attribute__((cleanup(pv_cleanup_file)))
#define cleanup_dir __attribute__((cleanup(pv_cleanup_dir)))

static inline int steal_fd(int *fd)
{
    int kept = *fd;

    *fd = -1;
    return kept;
}

#define steal_pointer(p)            \
    ({                              \
        __typeof__(*(p)) kept = *(p); \
        *(p) = NULL;                \
        kept;                       \
    })

#endif
