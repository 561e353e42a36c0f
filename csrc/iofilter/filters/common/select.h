/* Which requests a fault is for: by type, range and probability. Shared by `delay` and `error`. */
#ifndef PV_SELECT_H
#define PV_SELECT_H

#include "../all.h"

#define PV_SELECT_SETTINGS "types", "offset", "length", "probability", "seed"

struct pv_select {
    uint32_t types;       /* 1 << PV_IO_* */
    uint64_t first, end;  /* bytes; a flush has no range: any */
    double probability;
    uint64_t state;       /* of the random numbers: the same seed and the same requests, the same choice */
};

int pv_select_read(struct pv_select *select, const struct pv_settings *settings, struct pv_fail *fail);
bool pv_select_hit(struct pv_select *select, const struct pv_io *io);
/* "read,write" and the like; "all". */
int pv_setting_types(const struct pv_settings *settings, const char *name, uint32_t otherwise, uint32_t *out, struct pv_fail *fail);
/* splitmix64 (Steele, Lea, Flood 2014): a good 64 bits from any state, also from 0. */
uint64_t pv_random(uint64_t *state);

#endif
