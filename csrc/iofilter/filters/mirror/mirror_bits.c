/* Which regions may differ on the two sides, and which do. */
#include <string.h>

#include "mirror_rooms.h"

bool pv_mirror_is_dirty(const struct pv_mirror *self, uint64_t region)
{
    const uint8_t *page = pv_map_look(self->map, region / REGIONS_A_PAGE);

    return page && pv_mirror_get_bit(page, region % REGIONS_A_PAGE);
}

/* A region that becomes dirty is in a page that is backed. */
void pv_mirror_put_dirty(struct pv_mirror *self, uint64_t region, bool dirty)
{
    if (pv_mirror_is_dirty(self, region) != dirty)
        pv_mirror_put_bit(pv_map_change(self->map, region / REGIONS_A_PAGE), region % REGIONS_A_PAGE, dirty);
}

void pv_mirror_put_stale(struct pv_mirror *self, uint64_t region, bool stale)
{
    if (pv_mirror_get_bit(self->stale, region) == stale)
        return;
    pv_mirror_put_bit(self->stale, region, stale);
    self->stale_count += stale ? 1 : -1ull;
}

void pv_mirror_make_stale(struct pv_mirror *self, uint64_t start, uint64_t length)
{
    for (uint64_t region = start >> REGION_SHIFT; region <= (start + length - 1) >> REGION_SHIFT; region++)
        pv_mirror_put_stale(self, region, true);
}

void pv_mirror_begin_cleaning(struct pv_mirror *self)
{
    for (uint64_t page = 0; page * REGIONS_A_PAGE < self->regions; page++) {
        const uint8_t *bits = pv_map_look(self->map, page);
        uint64_t count = self->regions - page * REGIONS_A_PAGE;

        count = count < REGIONS_A_PAGE ? count : REGIONS_A_PAGE;
        if (bits)
            memcpy(self->cleaning + page * PV_MAP_PAGE, bits, (count + 7) / 8);
    }
}

/* What was dirty when the flush began, and was not written to since, nor is being written to, is the same on both
 * sides. */
void pv_mirror_end_cleaning(struct pv_mirror *self)
{
    for (uint64_t region = 0; region < self->regions; region++) {
        if (!self->cleaning[region / 8]) {
            region |= 7;
            continue;
        }
        if (pv_mirror_get_bit(self->cleaning, region) && !pv_mirror_get_bit(self->stale, region) &&
            !pv_bounce_writes(&self->bounce, region << REGION_SHIFT, REGION))
            pv_mirror_put_dirty(self, region, false);
    }
    memset(self->cleaning, 0, (self->regions + 7) / 8);
}

void pv_mirror_all_dirty_is_stale(struct pv_mirror *self)
{
    for (uint64_t region = 0; region < self->regions; region++)
        if (pv_mirror_is_dirty(self, region))
            pv_mirror_put_stale(self, region, true);
}
