/* Magazines: an object is in one hand at a time, whoever is moved; limits hold; the pool gets what magazines cannot hold. */
#include "check.h"
#include "percpu/magazine.h"

enum { HELD = 40, ROUNDS = SOME(3000), BYTES = 200 };

struct object {
    struct pv_percpu_node link;
    _Atomic(unsigned) owner;
};

static void use(unsigned number, void *context)
{
    struct pv_magazine *m = context;
    struct object *held[HELD];

    for (int round = 0; round < ROUNDS; round++) {
        int count = 1 + (int)((unsigned)round * 7 + number) % HELD;

        for (int i = 0; i < count; i++) {
            held[i] = pv_magazine_alloc(m);
            CHECK(held[i] && (uintptr_t)held[i] % PV_MAGAZINE_ALIGN == 0);
            CHECK(!atomic_exchange(&held[i]->owner, number + 1));
        }
        for (int i = 0; i < count; i++) {
            CHECK(atomic_exchange(&held[i]->owner, 0) == number + 1);
            pv_magazine_free(m, held[i]);
        }
    }
}

static void test_moved_threads(struct pv_percpu *areas)
{
    struct pv_magazine m;
    int err;

    CHECK(!pv_magazine_init(&m, areas, BYTES, 32, 0, &err));
    run_crowd(use, &m, SIGUSR1);
    printf("%zu objects, %lu fills, %lu drains\n", m.total, (unsigned long)m.fills, (unsigned long)m.drains);
    CHECK(m.fills && (SOME(100) < 100 || m.drains) && m.total >= HELD && m.total <= HELD * THREADS * 4);
    pv_magazine_destroy(&m);
}

static void test_limit(struct pv_percpu *areas)
{
    struct pv_magazine m;
    void *objects[50];
    int err = 0;

    CHECK(!pv_magazine_init(&m, areas, 1, 8, 50, &err));
    for (int i = 0; i < 50; i++) {
        objects[i] = pv_magazine_alloc(&m);
        CHECK(objects[i]);
        for (int k = 0; k < PV_MAGAZINE_ALIGN; k++)
            CHECK(((char *)objects[i])[k] == 0 || k < 8);
        memset(objects[i], 0xff, PV_MAGAZINE_ALIGN);
    }
    CHECK(!pv_magazine_alloc(&m) && m.total == 50);
    for (int i = 0; i < 50; i++)
        pv_magazine_free(&m, objects[i]);
    CHECK(pv_magazine_alloc(&m));
    pv_magazine_destroy(&m);
    CHECK(pv_magazine_init(&m, areas, 0, 8, 0, &err) == -1 && err == EINVAL);
    CHECK(pv_magazine_init(&m, areas, 8, 1, 0, &err) == -1 && err == EINVAL);
    CHECK(pv_magazine_init(&m, areas, 8, 1 << 20, 0, &err) == -1 && err == EINVAL);
}

static void ignore(int number)
{
    (void)number;
}

int main(void)
{
    struct pv_percpu *areas = areas_for(0);
    cpu_set_t all, one;
    int cpus[1] = {0};

    CHECK(!sigaction(SIGUSR1, &(struct sigaction){.sa_handler = ignore, .sa_flags = SA_RESTART}, NULL));
    test_moved_threads(areas);
    CHECK(!sched_getaffinity(0, sizeof all, &all));
    usable_cpus(cpus, 1);
    CPU_ZERO(&one);
    CPU_SET(cpus[0], &one);
    CHECK(!sched_setaffinity(0, sizeof one, &one));
    test_limit(areas);
    pv_percpu_destroy(areas);
    return 0;
}
