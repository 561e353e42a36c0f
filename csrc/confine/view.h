/* What the confined program sees of the machine: its own small root, and namespaces. */
#ifndef PV_CONFINE_VIEW_H
#define PV_CONFINE_VIEW_H

#include "options.h"

/* Leaves the caller's namespaces for new ones, as the options ask. In a user namespace the caller's ids stay. */
int view_unshare(const struct options *o, struct failure *f);

/* Builds the private root and makes it the process's root. Needs view_unshare() before, and CAP_SYS_ADMIN there. */
int view_build(struct options *o, struct failure *f);

#endif
