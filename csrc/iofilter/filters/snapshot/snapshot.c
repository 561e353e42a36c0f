/* A snapshot: from the moment in which the filter is attached, writes go to a delta, and what lies downstream stays as it was then.
 *
 * The engine is common/cow.h: downstream is the old side, the delta (a disk, a file, an NBD export) the new one. Taking a snapshot copies
 * nothing, whatever the disk's size. The state as it was is read by a handle at this filter (it passes only the filters downstream); going back
 * to it is detaching the filter and throwing the delta away.
 */
#include <errno.h>

#include "../common/cow.h"

static const char *const names[] = {"delta", "state", "cluster", NULL};

static int read_names(const struct pv_settings *settings, const char **delta, const char **state, struct pv_fail *fail)
{
    if (pv_settings_known(settings, names, fail))
        return -1;
    *delta = pv_setting_text(settings, "delta", NULL);
    *state = pv_setting_text(settings, "state", NULL);
    if (!*delta)
        return pv_fail(fail, EINVAL, "delta is not set: name where writes go, as file:PATH, disk:NAME or nbd:unix:PATH");
    if (!*state)
        return pv_fail(fail, EINVAL, "state is not set: name the file that holds the map of the snapshot");
    return 0;
}

static int snapshot_create(const struct pv_settings *settings, uint64_t size, struct pv_fail *fail)
{
    struct pv_cow_layout layout = {.old_size = size};
    const char *delta, *state;

    if (read_names(settings, &delta, &state, fail) || pv_setting_cluster(settings, &layout.cluster, fail))
        return -1;
    return pv_cow_create(state, "snapshot", &layout, size, fail);
}

static int snapshot_open(struct pv_filter *filter, const struct pv_settings *settings, struct pv_fail *fail)
{
    struct pv_cow *cow = (struct pv_cow *)filter;
    const char *delta, *state;

    if (read_names(settings, &delta, &state, fail) || pv_cow_open(cow, state, "snapshot", PV_OLD, fail))
        return -1;
    cow->target = pv_target_named(filter->instance, delta, filter->size, fail);
    if (cow->target)
        return 0;
    pv_map_close(cow->map);
    return -1;
}

/* The delta has the size that it has: the disk does not grow beyond it. */
static void snapshot_resized(struct pv_filter *filter, uint64_t size)
{
    struct pv_cow *cow = (struct pv_cow *)filter;
    uint64_t room = pv_target_size(cow->target);

    pv_cow_resized(filter, size < room ? size : room);
}

const struct pv_filter_class pv_snapshot_class = {
    .name = "snapshot",
    .order = PV_REPLICATION,
    .size = sizeof(struct pv_cow),
    .types = PV_ALL_TYPES,
    .persistent = true,
    .create = snapshot_create,
    .open = snapshot_open,
    .close = pv_cow_close,
    .attached = pv_cow_attached,
    .detach = pv_cow_detach,
    .request = pv_cow_request,
    .completed = pv_cow_completed,
    .resized = snapshot_resized,
    .figures = pv_cow_figures,
};
