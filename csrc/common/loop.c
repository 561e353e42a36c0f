#include "loop.h"

#include <errno.h>
#include <pthread.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#define SPIN_MIN_NS 2000 /* the first window after a short sleep */

uint64_t pv_loop_clock_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void on_wake(struct pv_event *event, uint32_t events)
{
    struct pv_loop *loop = pv_member(event, struct pv_loop, wake);
    uint64_t count;

    (void)events;
    while (read(loop->wake_fd, &count, sizeof(count)) < 0 && errno == EINTR)
        ;
}

int pv_loop_open(struct pv_loop *loop, uint64_t spin_max_ns, int *err)
{
    memset(loop, 0, sizeof(*loop));
    pv_list_init(&loop->pollers);
    pv_list_init(&loop->timers);
    loop->spin_max_ns = spin_max_ns;
    loop->wake.ready = on_wake;
    loop->now_ns = pv_loop_clock_ns();
    loop->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    loop->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (loop->epoll_fd < 0 || loop->wake_fd < 0) {
        *err = errno;
        pv_loop_close(loop);
        return -1;
    }
    if (pv_loop_watch(loop, loop->wake_fd, EPOLLIN, &loop->wake, err)) {
        pv_loop_close(loop);
        return -1;
    }
    return 0;
}

void pv_loop_close(struct pv_loop *loop)
{
    if (loop->epoll_fd >= 0)
        close(loop->epoll_fd);
    if (loop->wake_fd >= 0)
        close(loop->wake_fd);
    loop->epoll_fd = loop->wake_fd = -1;
}

static int control(struct pv_loop *loop, int what, int fd, uint32_t events, struct pv_event *event, int *err)
{
    struct epoll_event e = {.events = events, .data.ptr = event};

    if (epoll_ctl(loop->epoll_fd, what, fd, &e)) {
        *err = errno;
        return -1;
    }
    return 0;
}

int pv_loop_watch(struct pv_loop *loop, int fd, uint32_t events, struct pv_event *event, int *err)
{
    return control(loop, EPOLL_CTL_ADD, fd, events, event, err);
}

int pv_loop_rewatch(struct pv_loop *loop, int fd, uint32_t events, struct pv_event *event, int *err)
{
    return control(loop, EPOLL_CTL_MOD, fd, events, event, err);
}

void pv_loop_unwatch(struct pv_loop *loop, int fd, const struct pv_event *event)
{
    epoll_ctl(loop->epoll_fd, EPOLL_CTL_DEL, fd, NULL);
    for (unsigned i = loop->batch_next; i < loop->batch_count; i++)
        if (loop->batch[i].data.ptr == event)
            loop->batch[i].data.ptr = NULL;
}

void pv_loop_defer(struct pv_loop *loop, struct pv_task *task)
{
    if (task->queued)
        return;
    task->queued = true;
    task->next = loop->deferred;
    loop->deferred = task;
}

static bool take_out(struct pv_task **list, struct pv_task *task)
{
    for (; *list; list = &(*list)->next)
        if (*list == task) {
            *list = task->next;
            return true;
        }
    return false;
}

void pv_loop_undefer(struct pv_loop *loop, struct pv_task *task)
{
    if (task->queued && (take_out(&loop->deferred, task) || take_out(&loop->running, task)))
        task->queued = false;
}

static void wake(struct pv_loop *loop)
{
    uint64_t one = 1;

    while (write(loop->wake_fd, &one, sizeof(one)) < 0 && errno == EINTR)
        ;
}

void pv_loop_post(struct pv_loop *loop, struct pv_task *task)
{
    struct pv_task *head = __atomic_load_n(&loop->posted, __ATOMIC_RELAXED);

    do
        task->next = head;
    while (!__atomic_compare_exchange_n(&loop->posted, &head, task, true, __ATOMIC_RELEASE, __ATOMIC_RELAXED));
    if (!head)
        wake(loop); /* who found the stack empty wakes; the others' tasks are seen with that one */
}

void pv_loop_stop(struct pv_loop *loop)
{
    __atomic_store_n(&loop->stopping, true, __ATOMIC_RELEASE);
    wake(loop);
}

struct call {
    struct pv_task task;
    void (*run)(void *argument);
    void *argument;
    bool over;
    pthread_mutex_t mutex;
    pthread_cond_t ended;
};

static void run_call(struct pv_task *task)
{
    struct call *call = pv_member(task, struct call, task);

    call->run(call->argument);
    pthread_mutex_lock(&call->mutex);
    call->over = true;
    pthread_cond_signal(&call->ended);
    pthread_mutex_unlock(&call->mutex);
}

void pv_loop_call(struct pv_loop *loop, void (*run)(void *argument), void *argument)
{
    struct call call = {.task.run = run_call, .run = run, .argument = argument};

    pthread_mutex_init(&call.mutex, NULL);
    pthread_cond_init(&call.ended, NULL);
    pv_loop_post(loop, &call.task);
    pthread_mutex_lock(&call.mutex);
    while (!call.over)
        pthread_cond_wait(&call.ended, &call.mutex);
    pthread_mutex_unlock(&call.mutex);
    pthread_cond_destroy(&call.ended);
    pthread_mutex_destroy(&call.mutex);
}

void pv_loop_arm(struct pv_loop *loop, struct pv_timer *timer, uint64_t at_ns)
{
    struct pv_link *before;

    pv_list_remove(&timer->link);
    timer->at_ns = at_ns;
    before = loop->timers.prev;
    while (before != &loop->timers && pv_member(before, struct pv_timer, link)->at_ns > at_ns)
        before = before->prev;
    timer->link.prev = before;
    timer->link.next = before->next;
    before->next->prev = &timer->link;
    before->next = &timer->link;
}

void pv_loop_disarm(struct pv_loop *loop, struct pv_timer *timer)
{
    (void)loop;
    pv_list_remove(&timer->link);
}

void pv_loop_poll(struct pv_loop *loop, struct pv_poller *poller)
{
    pv_list_append(&loop->pollers, &poller->link);
    loop->armed += poller->arm != NULL;
}

void pv_loop_unpoll(struct pv_loop *loop, struct pv_poller *poller)
{
    loop->armed -= pv_linked(&poller->link) && poller->arm;
    pv_list_remove(&poller->link);
}

/* Tasks come newest first; they run in the order in which they came. */
static struct pv_task *reversed(struct pv_task *task)
{
    struct pv_task *before = NULL, *next;

    for (; task; task = next) {
        next = task->next;
        task->next = before;
        before = task;
    }
    return before;
}

static bool run_tasks(struct pv_task *newest)
{
    struct pv_task *next;

    for (struct pv_task *task = reversed(newest); task; task = next) {
        next = task->next; /* the task may free itself, or be queued again */
        task->queued = false;
        task->run(task);
    }
    return newest != NULL;
}

static bool run_posted(struct pv_loop *loop)
{
    if (!__atomic_load_n(&loop->posted, __ATOMIC_RELAXED))
        return false;
    return run_tasks(__atomic_exchange_n(&loop->posted, NULL, __ATOMIC_ACQUIRE));
}

/* Those that are left of the round are in `running`, where pv_loop_undefer finds them. */
static void run_round(struct pv_loop *loop)
{
    loop->running = reversed(loop->deferred);
    loop->deferred = NULL;
    while (loop->running) {
        struct pv_task *task = loop->running;

        loop->running = task->next;
        task->queued = false;
        task->run(task);
    }
}

static bool run_deferred(struct pv_loop *loop)
{
    unsigned round;

    for (round = 0; loop->deferred && round < PV_LOOP_ROUNDS; round++)
        run_round(loop);
    return round > 0;
}

static bool run_timers(struct pv_loop *loop)
{
    bool ran = false;

    while (!pv_list_empty(&loop->timers)) {
        struct pv_timer *timer = pv_member(loop->timers.next, struct pv_timer, link);

        if (timer->at_ns > loop->now_ns)
            break;
        pv_list_remove(&timer->link);
        timer->fire(timer);
        ran = true;
    }
    return ran;
}

static bool run_pollers(struct pv_loop *loop)
{
    bool found = false;
    struct pv_link *next;

    for (struct pv_link *link = loop->pollers.next; link != &loop->pollers; link = next) {
        struct pv_poller *poller = pv_member(link, struct pv_poller, link);

        found |= poller->poll(poller);
        next = pv_linked(link) ? link->next : &loop->pollers; /* it may have gone; the others have another turn */
    }
    return found;
}

static bool arm_pollers(struct pv_loop *loop)
{
    bool found = false;

    for (struct pv_link *link = loop->pollers.next; link != &loop->pollers; link = link->next) {
        struct pv_poller *poller = pv_member(link, struct pv_poller, link);

        if (poller->arm)
            found |= poller->arm(poller);
    }
    return found;
}

static void disarm_pollers(struct pv_loop *loop)
{
    for (struct pv_link *link = loop->pollers.next; link != &loop->pollers; link = link->next) {
        struct pv_poller *poller = pv_member(link, struct pv_poller, link);

        if (poller->disarm)
            poller->disarm(poller);
    }
}

static int wait_events(struct pv_loop *loop, uint64_t max_ns, bool *found, int *err)
{
    struct timespec limit = {(time_t)(max_ns / 1000000000u), (long)(max_ns % 1000000000u)};
    int count = epoll_pwait2(loop->epoll_fd, loop->batch, PV_LOOP_BATCH, max_ns == UINT64_MAX ? NULL : &limit, NULL);

    if (count < 0 && errno != EINTR) {
        *err = errno;
        return -1;
    }
    loop->batch_count = count < 0 ? 0 : (unsigned)count;
    for (loop->batch_next = 0; loop->batch_next < loop->batch_count;) {
        struct epoll_event *e = &loop->batch[loop->batch_next++];
        struct pv_event *event = e->data.ptr;

        if (event)
            event->ready(event, e->events);
        *found = true;
    }
    loop->batch_next = loop->batch_count = 0;
    loop->looked_ns = loop->now_ns;
    return 0;
}

/* One pass over everything that may have work, without sleeping. `sleeping`: if nothing is found the caller sleeps, which
 * looks at the descriptors. */
static int look(struct pv_loop *loop, bool sleeping, bool *found, int *err)
{
    bool more = false, due;

    *found = run_pollers(loop);
    *found |= run_posted(loop);
    *found |= run_timers(loop);
    due = *found ? loop->now_ns - loop->looked_ns >= PV_LOOP_LOOK_NS : !sleeping;
    if (due && wait_events(loop, 0, &more, err))
        return -1;
    *found |= more;
    *found |= run_deferred(loop);
    return 0;
}

/* How long the loop may sleep: at most to the next timer. */
static uint64_t sleep_limit(const struct pv_loop *loop, uint64_t max_ns)
{
    uint64_t at;

    if (pv_list_empty(&loop->timers))
        return max_ns;
    at = pv_member(loop->timers.next, struct pv_timer, link)->at_ns;
    if (at <= loop->now_ns)
        return 0;
    return at - loop->now_ns < max_ns ? at - loop->now_ns : max_ns;
}

static void adapt_window(struct pv_loop *loop, uint64_t slept_ns)
{
    if (slept_ns < loop->spin_max_ns)
        loop->window_ns = loop->window_ns ? loop->window_ns * 2 : SPIN_MIN_NS;
    else
        loop->window_ns /= 2;
    if (loop->window_ns > loop->spin_max_ns)
        loop->window_ns = loop->spin_max_ns;
    if (loop->window_ns < SPIN_MIN_NS)
        loop->window_ns = 0;
}

static int sleep_once(struct pv_loop *loop, uint64_t max_ns, int *err)
{
    uint64_t before;
    bool found = arm_pollers(loop);
    int status;

    loop->now_ns = before = pv_loop_clock_ns();
    loop->sleeps++;
    status = wait_events(loop, found ? 0 : sleep_limit(loop, max_ns), &found, err);
    loop->now_ns = pv_loop_clock_ns();
    disarm_pollers(loop);
    adapt_window(loop, loop->now_ns - before);
    if (!status)
        run_deferred(loop);
    return status;
}

int pv_loop_turn(struct pv_loop *loop, uint64_t max_sleep_ns, int *err)
{
    uint64_t idle_since = 0, window = loop->armed ? loop->window_ns : 0;
    bool stopping = __atomic_load_n(&loop->stopping, __ATOMIC_ACQUIRE), found;

    loop->turns++;
    do {
        loop->now_ns = pv_loop_clock_ns();
        if (look(loop, !window && max_sleep_ns && !stopping, &found, err))
            return -1;
        if (found)
            return 0;
        if (!idle_since)
            idle_since = loop->now_ns;
    } while (loop->now_ns - idle_since < window && loop->now_ns - idle_since < max_sleep_ns);
    if (stopping || !max_sleep_ns)
        return 0;
    return sleep_once(loop, max_sleep_ns, err);
}

int pv_loop_run(struct pv_loop *loop, int *err)
{
    while (!__atomic_load_n(&loop->stopping, __ATOMIC_ACQUIRE))
        if (pv_loop_turn(loop, UINT64_MAX, err))
            return -1;
    return 0;
}
