/* The rooms of the library that is preloaded into QEMU: preload.c hands over guest RAM, preload_trim.c gives back translated code. */
#ifndef PV_PRELOAD_H
#define PV_PRELOAD_H

#define PV_TRIM_SIGNAL 6 /* counted from SIGRTMIN; hypervisor/vmm/trim.py has the same */

/* Before main, in the first thread. Never fails: without it the signal does nothing. */
void pv_trim_start(void);

#endif
