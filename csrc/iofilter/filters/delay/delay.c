/* Holds requests back for a while: by type, range and probability. For tests of what lies above, and to see how an application bears a
 * slow disk. Requests that wait cost a list entry, no thread. */
#include <errno.h>

#include "../all.h"
#include "../common/held.h"
#include "../common/select.h"

struct delay {
    struct pv_filter filter;
    struct pv_select select;
    uint64_t delay_ns, jitter_ns;
    uint64_t delayed;
    struct pv_held held;
};

static const char *const names[] = {PV_SELECT_SETTINGS, "us", "jitter_us", NULL};

static int read_settings(struct delay *self, const struct pv_settings *settings, struct pv_fail *fail)
{
    uint64_t us, jitter;
    struct pv_select select;

    if (pv_settings_known(settings, names, fail) || pv_select_read(&select, settings, fail) ||
        pv_setting_size(settings, "us", 1000, 0, 3600ull * 1000000, &us, fail) ||
        pv_setting_size(settings, "jitter_us", 0, 0, 3600ull * 1000000, &jitter, fail))
        return -1;
    self->select = select;
    self->delay_ns = us * 1000;
    self->jitter_ns = jitter * 1000;
    return 0;
}

static int delay_open(struct pv_filter *filter, const struct pv_settings *settings, struct pv_fail *fail)
{
    struct delay *self = (struct delay *)filter;

    pv_held_init(&self->held, filter);
    return read_settings(self, settings, fail);
}

static int delay_set(struct pv_filter *filter, const struct pv_settings *settings, struct pv_fail *fail)
{
    return read_settings((struct delay *)filter, settings, fail);
}

static void delay_request(struct pv_filter *filter, struct pv_io *io)
{
    struct delay *self = (struct delay *)filter;
    uint64_t wait = self->delay_ns;

    if (!pv_select_hit(&self->select, io) || filter->instance->state != PV_RUNNING) {
        pv_io_pass(filter, io);
        return;
    }
    if (self->jitter_ns)
        wait += pv_random(&self->select.state) % (self->jitter_ns + 1);
    pv_add(&self->delayed, 1);
    pv_held_until(&self->held, io, pv_loop_clock_ns() + wait);
}

static void delay_drain(struct pv_filter *filter)
{
    pv_held_release(&((struct delay *)filter)->held);
}

static unsigned delay_figures(const struct pv_filter *filter, struct pv_figure *out, unsigned max)
{
    const struct delay *self = (const struct delay *)filter;
    unsigned count = 0;

    pv_figure(out, &count, max, "delayed", pv_get(&self->delayed));
    return count;
}

const struct pv_filter_class pv_delay_class = {
    .name = "delay",
    .order = PV_ANYWHERE,
    .size = sizeof(struct delay),
    .types = PV_ALL_TYPES,
    .open = delay_open,
    .request = delay_request,
    .drain = delay_drain,
    .set = delay_set,
    .figures = delay_figures,
};
