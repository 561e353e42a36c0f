/* What the filter `python` and a process in Python say to each other, on a Unix stream socket; little-endian, no padding.
 *
 *     filter                                   Python
 *     PV_PY_REQUEST id, write's data      ->
 *                                         <-   PV_PY_PASS id                     goes on as it is; nothing more is heard of it
 *                                         <-   PV_PY_END id, error, read's data  it is over
 *                                         <-   PV_PY_BELOW id, write's data      does it downstream (with this data) ...
 *     PV_PY_RESULT id, error, read's data ->                                     ... says how that went; then PASS is no answer any more
 *
 * hypervisor/iofilter/python_filter.py is the other end.
 */
#ifndef PV_PYTHON_H
#define PV_PYTHON_H

#include <stdint.h>

#define PV_PY_MAGIC 0x31595650u /* "PVY1" */

enum { PV_PY_REQUEST = 1, PV_PY_PASS, PV_PY_END, PV_PY_BELOW, PV_PY_RESULT };

struct pv_py_message {
    uint32_t magic, verb;
    uint64_t id, offset, length; /* offset, length: the request's */
    uint32_t type, flags;
    uint32_t error, data;        /* data: bytes that follow */
};

_Static_assert(sizeof(struct pv_py_message) == 48, "as Python packs it: <IIQQQIIII");

#endif
