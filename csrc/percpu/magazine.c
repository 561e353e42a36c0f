/* See magazine.h. */
#include "magazine.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define SLAB_OBJECTS 32

int pv_magazine_init(struct pv_magazine *m, struct pv_percpu *areas, size_t bytes, uint32_t capacity, size_t most, int *err)
{
    if (!bytes || bytes > SIZE_MAX / 2 / SLAB_OBJECTS || capacity < 2 || capacity >= PV_PERCPU_MAX_BYTES / 8) {
        *err = EINVAL;
        return -1;
    }
    *m = (struct pv_magazine){.capacity = capacity, .areas = areas, .most = most ? most : SIZE_MAX};
    m->bytes = (bytes + PV_MAGAZINE_ALIGN - 1) & ~(size_t)(PV_MAGAZINE_ALIGN - 1);
    if (pv_percpu_alloc(areas, (capacity + 1) * 8, &m->handle, err))
        return -1;
    if (pv_percpu_get(areas, m->handle, &m->stack, err))
        return -1;
    pthread_mutex_init(&m->lock, NULL);
    return 0;
}

void pv_magazine_destroy(struct pv_magazine *m)
{
    int ignored;

    pv_percpu_free(m->areas, m->handle, &ignored);
    while (m->slabs) {
        struct pv_percpu_node *slab = m->slabs;

        m->slabs = slab->next;
        free(slab);
    }
    pthread_mutex_destroy(&m->lock);
}

/* Whoever is preempted with the lock makes all others wait: so the kernel is asked for a little more time, where it can give some. */
static void lock_pool(struct pv_magazine *m)
{
    pthread_mutex_lock(&m->lock);
    pv_slice_begin();
}

static void unlock_pool(struct pv_magazine *m)
{
    pthread_mutex_unlock(&m->lock);
    pv_slice_end();
}

static void put(struct pv_magazine *m, void *object)
{
    struct pv_percpu_node *node = object;

    node->next = m->pool;
    m->pool = node;
}

/* Adds new objects to the pool, as many as a slab has or the limit leaves. Under the lock. */
static void add_slab(struct pv_magazine *m)
{
    size_t count = m->most - m->total < SLAB_OBJECTS ? m->most - m->total : SLAB_OBJECTS;
    size_t bytes = PV_MAGAZINE_ALIGN + count * m->bytes;
    char *slab = count ? aligned_alloc(PV_MAGAZINE_ALIGN, bytes) : NULL;

    if (!slab)
        return;
    memset(slab, 0, bytes);
    ((struct pv_percpu_node *)slab)->next = m->slabs;
    m->slabs = (struct pv_percpu_node *)slab;
    for (size_t i = 0; i < count; i++)
        put(m, slab + PV_MAGAZINE_ALIGN + i * m->bytes);
    m->total += count;
}

/* Up to `want` objects of the pool, linked. */
static struct pv_percpu_node *take(struct pv_magazine *m, uint64_t want)
{
    struct pv_percpu_node *taken = NULL;

    lock_pool(m);
    if (!m->pool)
        add_slab(m);
    for (m->fills++; want && m->pool; want--) {
        struct pv_percpu_node *node = m->pool;

        m->pool = node->next;
        node->next = taken;
        taken = node;
    }
    unlock_pool(m);
    return taken;
}

static void give(struct pv_magazine *m, struct pv_percpu_node *nodes)
{
    lock_pool(m);
    while (nodes) {
        struct pv_percpu_node *node = nodes;

        nodes = node->next;
        put(m, node);
    }
    m->drains++;
    unlock_pool(m);
}

/* One object for the caller, the others of half a magazine into this CPU's; what does not fit there any more goes back. */
void *pv_magazine_fill(struct pv_magazine *m)
{
    struct pv_percpu_node *nodes;
    void *object;

    if (pv_percpu_stack_pop(m->stack, &object) == 1) /* a thread without sequences, or one that was moved */
        return object;
    nodes = take(m, m->capacity / 2);
    if (!nodes)
        return NULL;
    object = nodes;
    for (nodes = nodes->next; nodes;) {
        struct pv_percpu_node *node = nodes;

        nodes = node->next;
        if (pv_percpu_stack_push(m->stack, m->capacity, node) != 1) {
            node->next = nodes;
            give(m, node);
            break;
        }
    }
    ((struct pv_percpu_node *)object)->next = NULL;
    return object;
}

void pv_magazine_drain(struct pv_magazine *m, void *object)
{
    struct pv_percpu_node *nodes = object;
    void *other;

    if (pv_percpu_stack_push(m->stack, m->capacity, object) == 1)
        return;
    nodes->next = NULL;
    for (uint64_t i = 0; i < m->capacity / 2 && pv_percpu_stack_pop(m->stack, &other) == 1; i++) {
        ((struct pv_percpu_node *)other)->next = nodes;
        nodes = other;
    }
    give(m, nodes);
}
