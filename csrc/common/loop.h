/* An event loop for one thread: descriptors, timers, deferred work, work from other threads, bounded polling.
 *
 * Theory of operation
 * -------------------
 * One turn of the loop:
 *
 *     poll every poller -> work posted by other threads -> due timers -> descriptors -> deferred tasks
 *         -> (nothing found?) sleep
 *
 * Descriptors cost a system call. A turn in which a poller found work leaves them out, unless PV_LOOP_LOOK_NS have passed
 * since they were looked at: so a busy ring delays a socket by that, and by the turn that is running, at most.
 *
 * Sleeping is dear: in a virtual machine a wake-up across CPUs costs more than most requests. So the loop goes on
 * polling for a window before it sleeps. The window adapts as KVM's halt polling does (linux/virt/kvm/kvm_main.c,
 * grow and shrink of halt_poll_ns): a sleep that ended sooner than `spin_max_ns` doubles it, a longer one halves
 * it. With `spin_max_ns` 0 the loop never spins, nor does it where no poller has `arm`: to look at descriptors alone
 * over and over costs a system call each time, and keeps the CPU from the peer that is to be waited for. While it polls,
 * pollers keep their peers' notifications suppressed; before it sleeps, `arm` asks for them again and looks once more, so
 * that nothing is missed.
 *
 * Deferred tasks run at the end of the turn that deferred them: that is where what was gathered in a turn goes out in
 * one system call (submissions to io_uring, replies to a socket, an interrupt to a guest). What they defer runs in the same
 * turn too, up to PV_LOOP_ROUNDS rounds: what a file has at once is answered in the turn that asked for it. The rest has the
 * next turn, so that tasks that defer one another keep nobody waiting.
 *
 * Threads: everything here is for the loop's own thread, but pv_loop_post and pv_loop_stop, which any thread may
 * call.
 * Lifetimes: events, tasks, timers and pollers lie in their owners, who take them off before they are freed. An event
 * that is unwatched is not called any more, also not in the turn that is running.
 */
#ifndef PV_LOOP_H
#define PV_LOOP_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/epoll.h>

#include "list.h"

#define PV_LOOP_BATCH 64
#define PV_LOOP_LOOK_NS 20000 /* descriptors wait so long for pollers that find work all the time */
#define PV_LOOP_ROUNDS 4      /* of deferred tasks, in a turn */

struct pv_event {
    void (*ready)(struct pv_event *event, uint32_t events); /* EPOLL* */
};

struct pv_task {
    void (*run)(struct pv_task *task);
    struct pv_task *next; /* the loop's */
    bool queued;          /* likewise */
};

struct pv_timer {
    void (*fire)(struct pv_timer *timer);
    uint64_t at_ns; /* pv_loop_now's clock */
    struct pv_link link;
};

struct pv_poller {
    bool (*poll)(struct pv_poller *poller);   /* does what there is to do; true: there was something */
    /* The loop may sleep: ask for wake-ups; true: there is work already. The loop is awake: none are needed. Both may
     * be NULL. */
    bool (*arm)(struct pv_poller *poller);
    void (*disarm)(struct pv_poller *poller);
    struct pv_link link;
};

struct pv_loop {
    int epoll_fd, wake_fd;
    uint64_t spin_max_ns, window_ns;
    uint64_t now_ns;            /* as of this turn */
    uint64_t looked_ns;         /* when descriptors were last looked at */
    struct pv_link pollers;     /* struct pv_poller */
    unsigned armed;             /* pollers that have `arm` */
    struct pv_link timers;      /* struct pv_timer, soonest first */
    struct pv_task *deferred;   /* newest first */
    struct pv_task *running;    /* deferred tasks of this turn that are still to run, oldest first */
    struct pv_task *posted;     /* atomic: newest first */
    struct pv_event wake;
    bool stopping;              /* atomic */
    unsigned batch_next, batch_count;
    struct epoll_event batch[PV_LOOP_BATCH];
    uint64_t turns, sleeps;
    void *uring; /* the ring that all files of this loop share: iofilter/uring.h */
};

/* 0, or -1 with a positive errno in *err and nothing held. */
int pv_loop_open(struct pv_loop *loop, uint64_t spin_max_ns, int *err);
/* Everything that was watched, armed or polled has been taken off before. */
void pv_loop_close(struct pv_loop *loop);

/* Turns until pv_loop_stop. 0, or -1 with *err (epoll failed). */
int pv_loop_run(struct pv_loop *loop, int *err);
/* One turn; sleeps at most until max_sleep_ns are over (UINT64_MAX: no limit). */
int pv_loop_turn(struct pv_loop *loop, uint64_t max_sleep_ns, int *err);
void pv_loop_stop(struct pv_loop *loop); /* any thread */

/* rewatch: the same descriptor, for other events. */
int pv_loop_watch(struct pv_loop *loop, int fd, uint32_t events, struct pv_event *event, int *err);
int pv_loop_rewatch(struct pv_loop *loop, int fd, uint32_t events, struct pv_event *event, int *err);
void pv_loop_unwatch(struct pv_loop *loop, int fd, const struct pv_event *event);

void pv_loop_defer(struct pv_loop *loop, struct pv_task *task); /* queued already: nothing happens */
/* Not queued: nothing happens. Who may have deferred a task takes it back before the task's memory goes. */
void pv_loop_undefer(struct pv_loop *loop, struct pv_task *task);
void pv_loop_post(struct pv_loop *loop, struct pv_task *task);  /* any thread; the task is not queued now */
/* Runs the task on the loop's thread and waits for its end. Not from the loop's own thread. */
void pv_loop_call(struct pv_loop *loop, void (*run)(void *argument), void *argument);

uint64_t pv_loop_clock_ns(void); /* CLOCK_MONOTONIC */
void pv_loop_arm(struct pv_loop *loop, struct pv_timer *timer, uint64_t at_ns); /* armed already: moved */
void pv_loop_disarm(struct pv_loop *loop, struct pv_timer *timer);

void pv_loop_poll(struct pv_loop *loop, struct pv_poller *poller);
void pv_loop_unpoll(struct pv_loop *loop, struct pv_poller *poller);

#endif
