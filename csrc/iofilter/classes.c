/* The table of filters: a new one adds a line here, and its folder below filters/. */
#include <errno.h>
#include <string.h>

#include "filter.h"
#include "filters/all.h"

static const struct pv_filter_class *const classes[] = {
    &pv_null_class,
    &pv_template_class,
    &pv_trace_class,
    &pv_stats_class,
    &pv_delay_class,
    &pv_error_class,
    &pv_throttle_class,
    &pv_python_class,
    &pv_cache_class,
    &pv_linkedclone_class,
    &pv_encrypt_class,
    &pv_integrity_class,
    &pv_snapshot_class,
    &pv_mirror_class,
};

const struct pv_filter_class *pv_filter_class_at(unsigned index)
{
    return index < sizeof classes / sizeof *classes ? classes[index] : NULL;
}

const struct pv_filter_class *pv_filter_class(const char *name)
{
    for (unsigned i = 0; i < sizeof classes / sizeof *classes; i++)
        if (!strcmp(classes[i]->name, name))
            return classes[i];
    return NULL;
}

int pv_filter_create(const char *class, const struct pv_settings *settings, uint64_t size, struct pv_fail *fail)
{
    const struct pv_filter_class *found = pv_filter_class(class);

    if (!found)
        return pv_fail(fail, EINVAL, "there is no filter %s", class);
    return found->create ? found->create(settings, size, fail) : 0;
}
