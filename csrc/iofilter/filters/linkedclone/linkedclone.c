/* A clone of a base disk: reads of what the clone never wrote are redirected to the base disk's own instance, writes stay on the clone.
 *
 * The engine is common/cow.h: the base is the old side, the clone's own file downstream is the new one.
 * Source: US 10331559 (a linked clone whose filter hands reads of base data to the first filter of the base disk's instance).
 */
#include <errno.h>

#include "../common/cow.h"

static const char *const names[] = {"base", "state", "cluster", NULL};

static int read_names(const struct pv_settings *settings, const char **base, const char **state, struct pv_fail *fail)
{
    if (pv_settings_known(settings, names, fail))
        return -1;
    *base = pv_setting_text(settings, "base", NULL);
    *state = pv_setting_text(settings, "state", NULL);
    if (!*base)
        return pv_fail(fail, EINVAL, "base is not set: name the base disk, as disk:NAME, nbd:unix:PATH or file:PATH");
    if (!*state)
        return pv_fail(fail, EINVAL, "state is not set: name the file that holds the map of the clone");
    return 0;
}

/* The size of the base is not asked here (it may be in another process): the clone's is taken, and the true one when it is opened. */
static int linkedclone_create(const struct pv_settings *settings, uint64_t size, struct pv_fail *fail)
{
    struct pv_cow_layout layout = {.old_size = size};
    const char *base, *state;

    if (read_names(settings, &base, &state, fail) || pv_setting_cluster(settings, &layout.cluster, fail))
        return -1;
    return pv_cow_create(state, "linkedclone", &layout, size, fail);
}

static int linkedclone_open(struct pv_filter *filter, const struct pv_settings *settings, struct pv_fail *fail)
{
    struct pv_cow *cow = (struct pv_cow *)filter;
    const char *base, *state;
    uint64_t size;

    if (read_names(settings, &base, &state, fail) || pv_cow_open(cow, state, "linkedclone", PV_NEW, fail))
        return -1;
    cow->target = pv_target_named(filter->instance, base, 0, fail);
    if (!cow->target) {
        pv_map_close(cow->map);
        return -1;
    }
    size = pv_target_size(cow->target);
    if (size < cow->old_size) /* a clone that is larger than its base: zeroes behind */
        cow->old_size = size;
    return 0;
}

const struct pv_filter_class pv_linkedclone_class = {
    .name = "linkedclone",
    .order = PV_CACHING,
    .size = sizeof(struct pv_cow),
    .types = PV_ALL_TYPES,
    .persistent = true,
    .create = linkedclone_create,
    .open = linkedclone_open,
    .close = pv_cow_close,
    .attached = pv_cow_attached,
    .detach = pv_cow_detach,
    .request = pv_cow_request,
    .completed = pv_cow_completed,
    .resized = pv_cow_resized,
    .figures = pv_cow_figures,
};
