/* Where the fault server runs: the rule is played through without faults, on the CPUs that this process may use. */
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>

#include "../../../csrc/memory/fault_place.h"

#define CHECK(condition)                                                                   \
    do {                                                                                   \
        if (!(condition)) {                                                                \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                \
            exit(1);                                                                       \
        }                                                                                  \
    } while (0)

#define NEAR_NS 8000u
#define FAR_NS 50000u

static uint64_t now = 1000000000;

/* So many faults, each after a time that depends on where the server is: near on candidate `good`, far elsewhere. */
static void storm(struct place *place, int faults, int good)
{
    while (faults--) {
        pv_place_answered(place, now);
        now += place->at == good ? NEAR_NS : FAR_NS;
        pv_place_fault(place, now);
    }
}

static void pause_for(struct place *place, uint64_t ns)
{
    pv_place_answered(place, now);
    now += ns;
    pv_place_fault(place, now);
}

static int runs_on(int cpu)
{
    cpu_set_t set;

    CHECK(!sched_getaffinity(0, sizeof set, &set));
    return CPU_COUNT(&set) == 1 && CPU_ISSET(cpu, &set);
}

static void test_the_best_cpu_is_held(struct place *place)
{
    int last = place->count - 1;

    storm(place, 2000, last);
    CHECK(place->state == HELD && place->at == last && runs_on(place->cpus[last]));
    pause_for(place, 10000000);
    CHECK(place->state == FREE && place->at == place->count && !runs_on(place->cpus[last]));
}

static void test_it_follows_a_toucher_that_moves(struct place *place)
{
    storm(place, 2000, 0);
    CHECK(place->state == HELD && place->at == 0);
    storm(place, 600, 1); /* one slow window, and what was left of the one before */
    CHECK(place->state == HELD && place->at == 1);
    pause_for(place, 10000000);
}

static void test_probing_is_rare_while_all_is_well(struct place *place)
{
    int away = 0;

    for (int i = 0; i < 50000; i++) {
        storm(place, 1, 0);
        away += place->at != 0;
    }
    CHECK(away > 0 && away < 500); /* and yet it looks again, for a second toucher may have a better place */
    pause_for(place, 10000000);
}

static void test_free_where_no_cpu_is_better(struct place *place)
{
    storm(place, 400, place->count);
    CHECK(place->state == HELD && place->at == place->count);
    pause_for(place, 10000000);
    storm(place, 400, -1); /* all alike */
    CHECK(place->at == place->count);
    pause_for(place, 10000000);
}

static void test_short_bursts_are_left_alone(struct place *place)
{
    for (int i = 0; i < 100; i++) {
        storm(place, 50, 0);
        CHECK(place->state == FREE && place->at == place->count);
        pause_for(place, 6000000);
    }
}

static void test_one_cpu(void)
{
    struct place place;
    cpu_set_t allowed, one;

    CHECK(!sched_getaffinity(0, sizeof allowed, &allowed));
    CPU_ZERO(&one);
    CPU_SET(sched_getcpu(), &one);
    CHECK(!sched_setaffinity(0, sizeof one, &one));
    pv_place_begin(&place);
    storm(&place, 5000, 0);
    CHECK(place.state == FREE);
    CHECK(!sched_setaffinity(0, sizeof allowed, &allowed));
}

int main(void)
{
    struct place place;

    test_one_cpu();
    pv_place_begin(&place);
    if (place.count < 2) {
        printf("place: one CPU, or very many: nothing to place\n");
        return 0;
    }
    test_the_best_cpu_is_held(&place);
    test_it_follows_a_toucher_that_moves(&place);
    test_probing_is_rare_while_all_is_well(&place);
    test_free_where_no_cpu_is_better(&place);
    test_short_bursts_are_left_alone(&place);
    printf("place: all passed\n");
    return 0;
}
