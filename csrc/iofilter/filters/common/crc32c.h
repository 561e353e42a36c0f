/* CRC-32C (Castagnoli, RFC 3720): the processor's instruction where it has one, else a table. */
#ifndef PV_CRC32C_H
#define PV_CRC32C_H

#include <stddef.h>
#include <stdint.h>

/* Of `data` behind what `crc` (0 to begin with) was computed of. */
uint32_t pv_crc32c(uint32_t crc, const void *data, size_t len);
/* The table's way, whatever the processor has: for tests. */
uint32_t pv_crc32c_table(uint32_t crc, const void *data, size_t len);

#endif
