/* The slow way: what an operation does where no sequence can run. See percpu.h. */
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "rooms.h"

#define SPINS_BEFORE_DOUBT 100

enum pv_slow pv_percpu_slow(struct pv_percpu_ref ref, char **room, uint32_t *area)
{
    uint32_t limit = __atomic_load_n(ref.limit, __ATOMIC_ACQUIRE);
    int cpu;

    if (!limit)
        return PV_SLOW_FREED;
    if (pv_rseq_origin() == PV_RSEQ_NONE && pv_rseq_register_thread())
        return PV_SLOW_AGAIN;
    cpu = sched_getcpu();
    *area = limit + (cpu < 0 ? 0 : (uint32_t)cpu % limit);
    *room = pv_percpu_at(ref, *area);
    return PV_SLOW_SHARED;
}

/* ---- locks of the shared areas ----------------------------------------------------------------------------------- */

static __thread uint32_t thread_id __attribute__((tls_model("initial-exec")));

static void forget_thread_id(void)
{
    thread_id = 0;
}

__attribute__((constructor)) static void watch_forks(void)
{
    pthread_atfork(NULL, NULL, forget_thread_id);
}

uint32_t pv_thread_id(void)
{
    if (!thread_id)
        thread_id = (uint32_t)syscall(SYS_gettid);
    return thread_id;
}

int pv_thread_gone(uint32_t id)
{
    return kill((pid_t)id, 0) && errno == ESRCH;
}

void pv_lock(uint32_t *lock)
{
    uint32_t own = pv_thread_id();

    for (unsigned spins = 1;; spins++) {
        uint32_t holder = 0;

        if (__atomic_compare_exchange_n(lock, &holder, own, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED))
            return;
        if (spins % SPINS_BEFORE_DOUBT)
            continue;
        if (pv_thread_gone(holder) &&
            __atomic_compare_exchange_n(lock, &holder, own, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED))
            return;
        sched_yield();
    }
}

void pv_unlock(uint32_t *lock)
{
    __atomic_store_n(lock, 0, __ATOMIC_RELEASE);
}

uint32_t *pv_shared_lock(struct pv_percpu_ref ref, uint32_t area)
{
    struct pv_percpu_header *header = (void *)((uintptr_t)ref.limit & ~(PV_PERCPU_HEADER_BYTES - 1));
    uint32_t *lock = &header->locks[area % PV_PERCPU_LOCKS];

    pv_lock(lock);
    return lock;
}

void pv_shared_unlock(uint32_t *lock)
{
    pv_unlock(lock);
}

/* ---- operations of one word: atomic instructions ----------------------------------------------------------------- */

/* Opens every slow operation: tries again once the thread is registered, says -1 when the item was freed; else `room` and `area` are set. */
#define SLOW_WAY(ref, again)                                  \
    char *room;                                               \
    uint32_t area;                                            \
                                                              \
    switch (pv_percpu_slow(ref, &room, &area)) {              \
    case PV_SLOW_AGAIN: return again;                         \
    case PV_SLOW_FREED: return -1;                            \
    case PV_SLOW_SHARED: break;                               \
    }

int pv_percpu_slow_add(struct pv_percpu_ref ref, int64_t n)
{
    SLOW_WAY(ref, pv_percpu_add(ref, n))
    __atomic_fetch_add((uint64_t *)room, (uint64_t)n, __ATOMIC_RELAXED);
    return 0;
}

int pv_percpu_slow_load(struct pv_percpu_ref ref, uint64_t *out)
{
    SLOW_WAY(ref, pv_percpu_load(ref, out))
    *out = __atomic_load_n((uint64_t *)room, __ATOMIC_ACQUIRE);
    return 0;
}

int pv_percpu_slow_store(struct pv_percpu_ref ref, uint64_t value)
{
    SLOW_WAY(ref, pv_percpu_store(ref, value))
    __atomic_store_n((uint64_t *)room, value, __ATOMIC_RELEASE);
    return 0;
}

int pv_percpu_slow_cas(struct pv_percpu_ref ref, uint64_t expected, uint64_t desired, uint64_t *seen)
{
    SLOW_WAY(ref, pv_percpu_cas(ref, expected, desired, seen))
    *seen = expected;
    return __atomic_compare_exchange_n((uint64_t *)room, seen, desired, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
}

/* ---- operations of several words: under the area's lock; the last store commits ---------------------------------- */

int pv_percpu_slow_push(struct pv_percpu_ref ref, struct pv_percpu_node *node)
{
    SLOW_WAY(ref, pv_percpu_push(ref, node))
    struct pv_percpu_node **head = (void *)room;
    uint32_t *lock = pv_shared_lock(ref, area);

    node->next = *head;
    __atomic_store_n(head, node, __ATOMIC_RELEASE);
    pv_shared_unlock(lock);
    return 0;
}

int pv_percpu_slow_pop(struct pv_percpu_ref ref, struct pv_percpu_node **out)
{
    SLOW_WAY(ref, pv_percpu_pop(ref, out))
    struct pv_percpu_node **head = (void *)room;
    uint32_t *lock = pv_shared_lock(ref, area);

    *out = *head;
    if (*out)
        __atomic_store_n(head, (*out)->next, __ATOMIC_RELEASE);
    pv_shared_unlock(lock);
    return *out != NULL;
}

int pv_percpu_slow_take(struct pv_percpu_ref ref, struct pv_percpu_node **out)
{
    SLOW_WAY(ref, pv_percpu_take(ref, out))
    struct pv_percpu_node **head = (void *)room;
    uint32_t *lock = pv_shared_lock(ref, area);

    *out = *head;
    __atomic_store_n(head, NULL, __ATOMIC_RELEASE);
    pv_shared_unlock(lock);
    return *out != NULL;
}

int pv_percpu_slow_stack_push(struct pv_percpu_ref ref, uint64_t capacity, void *item)
{
    SLOW_WAY(ref, pv_percpu_stack_push(ref, capacity, item))
    uint64_t *words = (void *)room;
    uint32_t *lock = pv_shared_lock(ref, area);
    uint64_t count = words[0];

    if (count < capacity) {
        words[1 + count] = (uintptr_t)item;
        __atomic_store_n(&words[0], count + 1, __ATOMIC_RELEASE);
    }
    pv_shared_unlock(lock);
    return count < capacity;
}

int pv_percpu_slow_stack_pop(struct pv_percpu_ref ref, void **out)
{
    SLOW_WAY(ref, pv_percpu_stack_pop(ref, out))
    uint64_t *words = (void *)room;
    uint32_t *lock = pv_shared_lock(ref, area);
    uint64_t count = words[0];

    if (count) {
        *out = (void *)(uintptr_t)words[count];
        __atomic_store_n(&words[0], count - 1, __ATOMIC_RELEASE);
    }
    pv_shared_unlock(lock);
    return count != 0;
}
