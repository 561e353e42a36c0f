#include "select.h"

#include <errno.h>
#include <string.h>

static int type_named(const char *name, size_t len)
{
    for (int i = 0; i < PV_IO_TYPES; i++)
        if (strlen(pv_io_type_names[i]) == len && !memcmp(pv_io_type_names[i], name, len))
            return i;
    return -1;
}

int pv_setting_types(const struct pv_settings *settings, const char *name, uint32_t otherwise, uint32_t *out, struct pv_fail *fail)
{
    const char *text = pv_setting_text(settings, name, NULL);
    uint32_t types = 0;

    *out = otherwise;
    if (!text)
        return 0;
    if (!strcmp(text, "all")) {
        *out = PV_ALL_TYPES;
        return 0;
    }
    for (const char *at = text;; at++) {
        size_t len = strcspn(at, ",");
        int type = type_named(at, len);

        if (type < 0)
            return pv_fail(fail, EINVAL, "%s=%.60s: a list of read, write, flush, discard, zeroes is wanted, or all", name, text);
        types |= 1u << type;
        at += len;
        if (!*at)
            break;
    }
    *out = types;
    return 0;
}

uint64_t pv_random(uint64_t *state)
{
    uint64_t z = (*state += 0x9e3779b97f4a7c15u);

    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

int pv_select_read(struct pv_select *select, const struct pv_settings *settings, struct pv_fail *fail)
{
    struct pv_select asked = {0};
    uint64_t length;

    if (pv_setting_types(settings, "types", 1 << PV_IO_READ | 1 << PV_IO_WRITE, &asked.types, fail) ||
        pv_setting_size(settings, "offset", 0, 0, UINT64_MAX, &asked.first, fail) ||
        pv_setting_size(settings, "length", UINT64_MAX, 1, UINT64_MAX, &length, fail) ||
        pv_setting_real(settings, "probability", 1, 0, 1, &asked.probability, fail) ||
        pv_setting_size(settings, "seed", 1, 0, UINT64_MAX, &asked.state, fail))
        return -1;
    if (__builtin_add_overflow(asked.first, length, &asked.end))
        asked.end = UINT64_MAX;
    *select = asked;
    return 0;
}

bool pv_select_hit(struct pv_select *select, const struct pv_io *io)
{
    if (!(select->types & (1u << io->type)))
        return false;
    if (io->type != PV_IO_FLUSH && (io->offset >= select->end || io->offset + io->length <= select->first))
        return false;
    if (select->probability >= 1)
        return true;
    return (double)(pv_random(&select->state) >> 11) * 0x1p-53 < select->probability;
}
