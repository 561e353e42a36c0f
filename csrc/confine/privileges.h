/* Who the confined program is and what it may still do. */
#ifndef PV_CONFINE_PRIVILEGES_H
#define PV_CONFINE_PRIVILEGES_H

#include "options.h"

/* Joins the cgroups, lowers the limits, sets the OOM score. Needs the host's /sys/fs/cgroup and /proc. */
int privileges_limit(const struct options *o, struct failure *f);

/* Becomes the user, gives up every capability for good, and forbids new privileges. There is no way back. */
int privileges_drop(const struct options *o, struct failure *f);

/* Denies, for good, the system calls that a VM's processes never need and that attacks do. Needs no privilege after
 * privileges_drop(). Architectures other than x86-64 and AArch64: ENOSYS. */
int filter_install(struct failure *f);

/* Puts the process in a Landlock domain of its own, where the kernel has it: it can then neither trace nor (ABI 6)
 * signal any process outside, whoever owns it, nor reach abstract sockets outside. This is what keeps the VMs of one
 * ordinary user apart. A kernel without it is no error. */
int landlock_enter(struct failure *f);

#endif
