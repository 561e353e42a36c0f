/* See fault_place.h. */
#include "fault_place.h"

#include <string.h>

enum { STORM = 64, PROBE = 16, WINDOW = 256, WINDOWS = 32 };

#define QUIET_NS 5000000u
#define LONGEST_NS 100000u /* a guest that computes in between says nothing about wake-ups */

void pv_place_begin(struct place *place)
{
    memset(place, 0, sizeof *place);
    if (sched_getaffinity(0, sizeof place->allowed, &place->allowed) || CPU_COUNT(&place->allowed) > PLACE_CPUS)
        return;
    for (int cpu = 0; cpu < CPU_SETSIZE && place->count < PLACE_CPUS; cpu++)
        if (CPU_ISSET(cpu, &place->allowed))
            place->cpus[place->count++] = cpu;
    place->at = place->count;
    place->left = STORM;
}

/* The calling thread to candidate `at`. A refusal leaves it where it is, and the candidate is as good as that. */
static void move(struct place *place, int at)
{
    cpu_set_t one;

    if (place->at == at)
        return;
    CPU_ZERO(&one);
    if (at < place->count)
        CPU_SET(place->cpus[at], &one);
    sched_setaffinity(0, sizeof one, at < place->count ? &one : &place->allowed);
    place->at = at;
}

static void set_free(struct place *place)
{
    move(place, place->count);
    place->state = FREE;
    place->left = STORM;
}

/* The best candidate; a CPU has to be better than none by a quarter. */
static int best(const struct place *place)
{
    int found = place->count;
    uint64_t least = place->spent[found] - place->spent[found] / 4;

    for (int i = 0; i < place->count; i++)
        if (place->spent[i] < least) {
            least = place->spent[i];
            found = i;
        }
    return found;
}

static void hold(struct place *place, int at)
{
    place->state = HELD;
    place->left = WINDOW;
    place->windows = WINDOWS;
    place->expected = place->spent[at] * (WINDOW / PROBE);
    place->spent[at] = 0;
    move(place, at);
}

/* Whether the last window was as it should be, and there are more to come. */
static int still_good(struct place *place)
{
    uint64_t spent = place->spent[place->at];

    place->spent[place->at] = 0;
    place->left = WINDOW;
    return --place->windows && spent <= 2 * place->expected;
}

static void step(struct place *place)
{
    if (place->state == PROBING && place->at == place->count) {
        hold(place, best(place));
        return;
    }
    if (place->state == HELD && still_good(place))
        return;
    if (place->state == PROBING) {
        move(place, place->at + 1);
    } else {
        memset(place->spent, 0, sizeof place->spent);
        place->state = PROBING;
        move(place, 0);
    }
    place->left = PROBE;
}

void pv_place_fault(struct place *place, uint64_t now)
{
    uint64_t spent = now - place->ended;

    if (place->count < 2)
        return;
    if (spent > QUIET_NS) {
        set_free(place);
        return;
    }
    place->spent[place->at] += spent < LONGEST_NS ? spent : LONGEST_NS;
    if (!--place->left)
        step(place);
}

void pv_place_answered(struct place *place, uint64_t now)
{
    place->ended = now;
}
