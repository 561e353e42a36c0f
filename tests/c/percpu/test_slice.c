/* The kernel's time-slice extension (Linux 7.0), whose part this program plays: prctl says that there is one, or none. A lock of ours is held
 * with the thread's request set, and no request stays behind. What a real kernel makes of it is not seen here. */
#include <stdarg.h>
#include <stdint.h>
#include <sys/prctl.h>

#include "check.h"
#include "percpu/magazine.h"

enum { OBJECTS = 200 };

static int offered, asked;
static unsigned requested_in_lock, not_requested_in_lock;

static uint8_t *slice_ctrl(void)
{
    return (uint8_t *)__builtin_thread_pointer() + pv_rseq_offset + PV_RSEQ_SLICE_CTRL;
}

/* libc's, for this program. */
int prctl(int option, ...)
{
    (void)option;
    asked++;
    errno = offered ? 0 : EINVAL;
    return offered ? 0 : -1;
}

/* The pool makes new objects under its lock. */
void *aligned_alloc(size_t alignment, size_t bytes)
{
    void *room;

    *(*slice_ctrl() ? &requested_in_lock : &not_requested_in_lock) += 1;
    return posix_memalign(&room, alignment, bytes) ? NULL : room;
}

static void *use_a_cache(void *ignored)
{
    struct pv_percpu *areas;
    struct pv_magazine cache;
    void *objects[OBJECTS];
    int err;

    (void)ignored;
    CHECK(!pv_percpu_create(0, &areas, &err) && !pv_magazine_init(&cache, areas, 64, 8, 0, &err));
    for (int i = 0; i < OBJECTS; i++)
        CHECK((objects[i] = pv_magazine_alloc(&cache)));
    for (int i = 0; i < OBJECTS; i++)
        pv_magazine_free(&cache, objects[i]);
    CHECK(cache.fills && cache.drains && *slice_ctrl() == 0);
    pv_magazine_destroy(&cache);
    pv_percpu_destroy(areas);
    return NULL;
}

static void *end_a_grant(void *ignored)
{
    (void)ignored;
    pv_slice_begin();
    CHECK(*slice_ctrl() == 1);
    slice_ctrl()[0] = 0; /* as the kernel does when it grants more time */
    slice_ctrl()[1] = 1;
    errno = 0;
    pv_slice_end();
    CHECK(errno == ENOSYS || slice_ctrl()[1] == 0); /* it gave the CPU back: an older kernel has no such call */
    slice_ctrl()[1] = 0;
    return NULL;
}

static void in_a_thread(void *(*run)(void *))
{
    pthread_t thread;

    CHECK(!pthread_create(&thread, NULL, run, NULL) && !pthread_join(thread, NULL));
}

int main(void)
{
    if (!PV_HAS_SEQUENCES || !pv_rseq_register_thread()) {
        printf("no rseq here: nothing to extend\n");
        return 0;
    }
    in_a_thread(use_a_cache);
    CHECK(asked == 1 && !requested_in_lock && not_requested_in_lock);
    offered = 1;
    in_a_thread(use_a_cache);
    CHECK(asked == 2 && requested_in_lock == not_requested_in_lock);
    in_a_thread(end_a_grant);
    CHECK(asked == 3);
    return 0;
}
