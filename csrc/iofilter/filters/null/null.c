/* Passes every request on: what a filter costs that does nothing. Benches put it into chains by the dozen. */
#include "../all.h"

struct null {
    struct pv_filter filter;
};

static const char *const names[] = {NULL};

static int null_open(struct pv_filter *filter, const struct pv_settings *settings, struct pv_fail *fail)
{
    (void)filter;
    return pv_settings_known(settings, names, fail);
}

const struct pv_filter_class pv_null_class = {
    .name = "null",
    .order = PV_ANYWHERE,
    .size = sizeof(struct null),
    .types = PV_ALL_TYPES,
    .open = null_open,
    .request = pv_io_pass,
};
