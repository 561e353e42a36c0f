/* Bounds requests and bytes a second, with bursts; several disks may share one bound.
 *
 * Theory of operation: a token bucket, kept as the time at which it would be full again (the generic cell rate algorithm, ITU-T I.371). A
 * request of cost c moves that time t to max(t, now) + c, and may go as soon as max(t, now) - burst <= now: one number a bucket, moved by a
 * compare-and-swap, so that the disks of a group, each on its own thread, share a bucket without a lock. A request takes its tokens when
 * it comes and waits for the later of the two times, of requests and of bytes. As times only grow, the requests of a disk keep their order.
 *
 * A flush costs nothing and is never held: it would hold up the writes of others.
 */
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "../all.h"
#include "../common/held.h"
#include "../common/select.h"

struct bucket {
    double cost_ns;    /* of one request or one byte; 0: no bound */
    uint64_t burst_ns; /* what it may be ahead */
    uint64_t full_ns;  /* atomic */
};

struct group {
    char name[64];
    unsigned users; /* under groups_lock */
    struct bucket requests, bytes;
    struct group *next;
};

struct throttle {
    struct pv_filter filter;
    struct group *group; /* its own, or one of `groups` */
    uint32_t types;
    uint64_t held_requests, held_ns;
    struct pv_held held;
};

/* Named groups. The lock is for those who open, close and set filters; no request takes it. */
static pthread_mutex_t groups_lock = PTHREAD_MUTEX_INITIALIZER;
static struct group *groups;

static const char *const names[] = {"iops", "bytes", "burst_iops", "burst_bytes", "group", "types", NULL};

static void make_bucket(struct bucket *bucket, uint64_t rate, uint64_t burst)
{
    bucket->cost_ns = rate ? 1e9 / (double)rate : 0;
    bucket->burst_ns = (uint64_t)((double)burst * bucket->cost_ns);
    bucket->full_ns = 0;
}

static int read_settings(struct group *group, uint32_t *types, const struct pv_settings *settings, struct pv_fail *fail)
{
    const char *name = pv_setting_text(settings, "group", "");
    uint64_t iops, bytes, burst_iops, burst_bytes;

    if (pv_settings_known(settings, names, fail) ||
        pv_setting_types(settings, "types", PV_ALL_TYPES & ~(1u << PV_IO_FLUSH), types, fail) ||
        pv_setting_size(settings, "iops", 0, 1, 1000000000, &iops, fail) ||
        pv_setting_size(settings, "bytes", 0, 512, 1ull << 44, &bytes, fail) ||
        pv_setting_size(settings, "burst_iops", iops / 10 + 1, 1, 1000000000, &burst_iops, fail) ||
        pv_setting_size(settings, "burst_bytes", bytes / 10 + 1, 1, 1ull << 44, &burst_bytes, fail))
        return -1;
    if (!iops && !bytes)
        return pv_fail(fail, EINVAL, "neither iops nor bytes is set: set at least one of them");
    if (strlen(name) >= sizeof group->name)
        return pv_fail(fail, EINVAL, "group=%.40s...: at most 63 characters", name);
    *types &= ~(1u << PV_IO_FLUSH);
    strcpy(group->name, name);
    make_bucket(&group->requests, iops, burst_iops);
    make_bucket(&group->bytes, bytes, burst_bytes);
    return 0;
}

static bool same_rates(const struct group *a, const struct group *b)
{
    return a->requests.cost_ns == b->requests.cost_ns && a->requests.burst_ns == b->requests.burst_ns &&
           a->bytes.cost_ns == b->bytes.cost_ns && a->bytes.burst_ns == b->bytes.burst_ns;
}

static struct group *find(const char *name)
{
    for (struct group *group = groups; group; group = group->next)
        if (!strcmp(group->name, name))
            return group;
    return NULL;
}

/* The group of that name, with these rates, or a new one. Under the lock. */
static struct group *join(const struct group *asked, struct pv_fail *fail)
{
    struct group *group = asked->name[0] ? find(asked->name) : NULL;

    if (group && !same_rates(group, asked)) {
        pv_fail(fail, EINVAL, "group %s has other rates already: give the same ones, or another name", asked->name);
        return NULL;
    }
    if (!group) {
        group = malloc(sizeof *group);
        if (!group) {
            pv_fail(fail, ENOMEM, "no memory for a group");
            return NULL;
        }
        *group = *asked;
        group->users = 0;
        if (asked->name[0]) {
            group->next = groups;
            groups = group;
        }
    }
    group->users++;
    return group;
}

static void leave(struct group *group)
{
    pthread_mutex_lock(&groups_lock);
    if (!--group->users) {
        for (struct group **at = &groups; *at; at = &(*at)->next)
            if (*at == group) {
                *at = group->next;
                break;
            }
        free(group);
    }
    pthread_mutex_unlock(&groups_lock);
}

static int throttle_open(struct pv_filter *filter, const struct pv_settings *settings, struct pv_fail *fail)
{
    struct throttle *self = (struct throttle *)filter;
    struct group asked = {0};

    if (read_settings(&asked, &self->types, settings, fail))
        return -1;
    pv_held_init(&self->held, filter);
    pthread_mutex_lock(&groups_lock);
    self->group = join(&asked, fail);
    pthread_mutex_unlock(&groups_lock);
    return self->group ? 0 : -1;
}

static void throttle_close(struct pv_filter *filter)
{
    leave(((struct throttle *)filter)->group);
}

/* The only user of a group may change its rates; else the new settings must name another group or the same rates. */
static int throttle_set(struct pv_filter *filter, const struct pv_settings *settings, struct pv_fail *fail)
{
    struct throttle *self = (struct throttle *)filter;
    struct group asked = {0}, *joined, *before = self->group;
    uint32_t types;

    if (read_settings(&asked, &types, settings, fail))
        return -1;
    pthread_mutex_lock(&groups_lock);
    if (before->users == 1 && !strcmp(before->name, asked.name)) {
        before->requests = asked.requests;
        before->bytes = asked.bytes;
        joined = before;
    } else {
        joined = join(&asked, fail);
    }
    pthread_mutex_unlock(&groups_lock);
    if (!joined)
        return -1;
    self->types = types;
    self->group = joined;
    if (joined != before)
        leave(before);
    return 0;
}

/* Takes `amount` tokens; returns when they are there. */
static uint64_t take(struct bucket *bucket, uint64_t amount, uint64_t now)
{
    uint64_t full, from;

    if (bucket->cost_ns == 0)
        return now;
    full = __atomic_load_n(&bucket->full_ns, __ATOMIC_RELAXED);
    do
        from = full > now ? full : now;
    while (!__atomic_compare_exchange_n(&bucket->full_ns, &full, from + (uint64_t)((double)amount * bucket->cost_ns), true,
        __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return from > bucket->burst_ns ? from - bucket->burst_ns : 0;
}

static void throttle_request(struct pv_filter *filter, struct pv_io *io)
{
    struct throttle *self = (struct throttle *)filter;
    uint64_t now, at, bytes_at;

    if (!(self->types & (1u << io->type)) || filter->instance->state != PV_RUNNING) {
        pv_io_pass(filter, io);
        return;
    }
    now = pv_loop_clock_ns();
    at = take(&self->group->requests, 1, now);
    bytes_at = take(&self->group->bytes, io->type <= PV_IO_WRITE ? io->length : 0, now);
    at = at > bytes_at ? at : bytes_at;
    if (at <= now && !self->held.count) {
        pv_io_pass(filter, io);
        return;
    }
    pv_add(&self->held_requests, 1);
    pv_add(&self->held_ns, at > now ? at - now : 0);
    pv_held_until(&self->held, io, at);
}

static void throttle_drain(struct pv_filter *filter)
{
    pv_held_release(&((struct throttle *)filter)->held);
}

static unsigned throttle_figures(const struct pv_filter *filter, struct pv_figure *out, unsigned max)
{
    const struct throttle *self = (const struct throttle *)filter;
    unsigned count = 0;

    pv_figure(out, &count, max, "held_requests", pv_get(&self->held_requests));
    pv_figure(out, &count, max, "held_ns", pv_get(&self->held_ns));
    return count;
}

const struct pv_filter_class pv_throttle_class = {
    .name = "throttle",
    .order = PV_INSPECTION,
    .size = sizeof(struct throttle),
    .types = PV_ALL_TYPES & ~(1u << PV_IO_FLUSH),
    .open = throttle_open,
    .close = throttle_close,
    .request = throttle_request,
    .drain = throttle_drain,
    .set = throttle_set,
    .figures = throttle_figures,
};
