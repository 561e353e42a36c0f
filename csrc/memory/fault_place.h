/* Where the serving thread runs: on the CPU that faults, if that can be found out.
 *
 * Theory of operation
 * -------------------
 * A toucher that is woken on the CPU where its page was copied goes on after 9 us; across CPUs the two wake-ups take 40 to 65 us in a
 * VM. The kernel puts a thread that wakes on an idle CPU, so on a host with idle ones nearly always on the wrong one. The process that
 * serves is confined and cannot look up where the toucher is; but it sees how soon the next fault comes, and so tries:
 *
 *      FREE --STORM faults in quick succession--> PROBING each CPU, and none, for PROBE faults --the best--> HELD for WINDOWS windows
 *       ^                                            ^-------- or until one was twice as slow: it moved ----------'
 *       '---- a pause of QUIET_NS, whatever the state: storms are over soon, and nobody stays pinned for the next
 *
 * The measure is the mean time from the end of one answer to the next fault: two changes of thread, and what the guest does between
 * them, which is the same for all. Several touchers on several CPUs look alike from everywhere; then none is best, and it stays free.
 *
 * One thread's; no locks. With a single allowed CPU, or more than PLACE_CPUS, it does nothing.
 */
#ifndef PV_FAULT_PLACE_H
#define PV_FAULT_PLACE_H

#include <sched.h>
#include <stdint.h>

#define PLACE_CPUS 8

struct place {
    cpu_set_t allowed;
    int cpus[PLACE_CPUS], count;
    enum { FREE, PROBING, HELD } state;
    int at;        /* candidate: index into cpus; count: none of them */
    unsigned left; /* faults until the next step */
    unsigned windows; /* of WINDOW faults, until the next probing */
    uint64_t ended, spent[PLACE_CPUS + 1], expected; /* nanoseconds: in WINDOW faults, when the candidate was chosen */
};

/* For the calling thread, as it is allowed to run now. */
void pv_place_begin(struct place *place);

/* A fault was read, or has been answered, at `now` (monotonic nanoseconds). */
void pv_place_fault(struct place *place, uint64_t now);
void pv_place_answered(struct place *place, uint64_t now);

#endif
