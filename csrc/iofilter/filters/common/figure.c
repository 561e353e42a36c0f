#include <stdio.h>

#include "../all.h"

const char *const pv_io_type_names[PV_IO_TYPES] = {"read", "write", "flush", "discard", "zeroes"};

void pv_figure(struct pv_figure *out, unsigned *count, unsigned max, const char *name, uint64_t value)
{
    if (*count >= max)
        return;
    snprintf(out[*count].name, sizeof out[*count].name, "%s", name);
    out[(*count)++].value = value;
}
