/* See frames.h. */
#include "frames.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "loader.h"

struct pv_frames {
    const char *store;
    uint64_t bytes;
    int loader;
    pthread_mutex_t asking; /* one ask at a time: the answer is to the last one */
    _Atomic(int) lost;
    _Atomic(uint64_t) found, asked;
};

static int fail(int *err, int code)
{
    *err = code;
    return -1;
}

static int map_store(struct pv_frames *frames, int store, int *err)
{
    int seals = fcntl(store, F_GET_SEALS);
    struct stat status;
    void *map;

    if (fstat(store, &status))
        return fail(err, errno);
    /* One that could shrink could end this process with SIGBUS. */
    if (seals < 0 || !(seals & F_SEAL_SHRINK) || status.st_size < (off_t)PV_PAGE_SIZE || status.st_size % PV_PAGE_SIZE)
        return fail(err, EINVAL);
    map = mmap(NULL, (size_t)status.st_size, PROT_READ, MAP_SHARED, store, 0);
    if (map == MAP_FAILED)
        return fail(err, errno);
    frames->store = map;
    frames->bytes = (uint64_t)status.st_size;
    return 0;
}

int pv_frames_open(int store, int loader, struct pv_frames **out, int *err)
{
    struct pv_frames *frames = calloc(1, sizeof *frames);

    if (!frames)
        return fail(err, ENOMEM);
    frames->loader = -1;
    pthread_mutex_init(&frames->asking, NULL);
    if (map_store(frames, store, err)) {
        pv_frames_close(frames);
        return -1;
    }
    frames->loader = fcntl(loader, F_DUPFD_CLOEXEC, 0);
    if (frames->loader < 0) {
        *err = errno;
        pv_frames_close(frames);
        return -1;
    }
    *out = frames;
    return 0;
}

void pv_frames_close(struct pv_frames *frames)
{
    if (!frames)
        return;
    if (frames->store)
        munmap((void *)frames->store, frames->bytes);
    if (frames->loader >= 0)
        close(frames->loader);
    pthread_mutex_destroy(&frames->asking);
    free(frames);
}

int pv_frames_find(struct pv_frames *frames, const struct pv_pfdb *db, const struct pv_translation *page, uint64_t pages,
                   struct pv_piece *out)
{
    uint64_t left = atomic_load_explicit(&page->vad->pages, memory_order_relaxed) - page->page, n = 0;
    uint32_t first = 0;

    for (; n < pages && n < left; n++) {
        uint64_t entry = atomic_load_explicit(&db->slots[page->pfe + n], memory_order_acquire);

        if (pv_pfe_state(entry) != PV_PFE_PRESENT || pv_pfe_frame(entry) >= frames->bytes >> PV_PAGE_SHIFT)
            break;
        if (!n)
            first = pv_pfe_frame(entry);
        else if (pv_pfe_frame(entry) != first + n)
            break;
    }
    if (!n)
        return 0;
    *out = (struct pv_piece){frames->store + ((uint64_t)first << PV_PAGE_SHIFT), n << PV_PAGE_SHIFT, -1};
    atomic_fetch_add_explicit(&frames->found, n, memory_order_relaxed);
    return 1;
}

static int64_t now_ms(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

/* 1: something can be read, 0: the deadline has passed, or it cannot be waited. */
static int wait_for_answer(int loader, int64_t deadline)
{
    struct pollfd polled = {loader, POLLIN, 0};
    int64_t left;

    while ((left = deadline - now_ms()) > 0) {
        int ready = poll(&polled, 1, (int)left);

        if (ready > 0)
            return 1;
        if (ready < 0 && errno != EINTR)
            return 0;
    }
    return 0;
}

/* 0 with *no, or -1: the loader is lost. */
static int converse(int loader, const struct pv_loader_ask *ask, uint32_t *no)
{
    struct pv_loader_answer answer;

    if (send(loader, ask, sizeof *ask, MSG_NOSIGNAL | MSG_DONTWAIT) != sizeof *ask ||
        !wait_for_answer(loader, now_ms() + PV_FRAMES_PATIENCE_MS) ||
        recv(loader, &answer, sizeof answer, MSG_DONTWAIT | MSG_TRUNC) != sizeof answer ||
        memcmp(&answer.to, ask, sizeof *ask) != 0)
        return -1;
    *no = answer.no;
    return 0;
}

int pv_frames_ask(struct pv_frames *frames, uint32_t vad, uint32_t page)
{
    struct pv_loader_ask ask = {vad, page};
    uint32_t no = 1;

    pthread_mutex_lock(&frames->asking);
    if (!atomic_load_explicit(&frames->lost, memory_order_relaxed)) {
        atomic_fetch_add_explicit(&frames->asked, 1, memory_order_relaxed);
        if (converse(frames->loader, &ask, &no))
            atomic_store_explicit(&frames->lost, 1, memory_order_relaxed); /* a late answer must not be taken for the next one */
    }
    pthread_mutex_unlock(&frames->asking);
    return no ? -1 : 0;
}

void pv_frames_counts(const struct pv_frames *frames, uint64_t *found, uint64_t *asked)
{
    *found = atomic_load_explicit(&frames->found, memory_order_relaxed);
    *asked = atomic_load_explicit(&frames->asked, memory_order_relaxed);
}
