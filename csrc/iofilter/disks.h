/* The disks of a process, as another language sees them: one loop, on which all of them live, and calls that any
 * thread may make.
 *
 * Calls that change a disk reach the loop and wait for it; none of them may be made from the loop's own thread. Those
 * that open files or connect block the caller, never the loop. Every call that can fail returns -1 (or NULL) and
 * fills in *fail; what it
 * was to change is then as before.
 */
#ifndef PV_DISKS_H
#define PV_DISKS_H

#include <stdbool.h>
#include <stdint.h>

struct pv_disks;
struct pv_disk;
struct pv_instance;
struct pv_loop;
struct pv_nbd_server;

struct pv_disk_fail {
    int error; /* positive errno */
    char text[240];
};

struct pv_disk_setting {
    const char *name, *value;
};

struct pv_disk_figure {
    char name[32];
    uint64_t value;
};

/* `spin_ns`: how long the loop may poll before it sleeps. NULL: *fail. */
struct pv_disks *pv_disks_new(uint64_t spin_ns, struct pv_disk_fail *fail);
/* Runs the loop on this thread until pv_disks_stop; 0 or -1. */
int pv_disks_run(struct pv_disks *disks, struct pv_disk_fail *fail);
void pv_disks_stop(struct pv_disks *disks);
void pv_disks_free(struct pv_disks *disks); /* the loop has ended, its disks are closed */
struct pv_loop *pv_disks_loop(struct pv_disks *disks);

/* A disk whose data is a file (or block device), or an NBD server's export; without filters. It is quiet until
 * pv_disk_start. It can be named
 * by other disks of this process, as "disk:NAME". */
struct pv_disk *pv_disk_open_file(struct pv_disks *disks, const char *name, int fd, bool read_only, bool direct,
    struct pv_disk_fail *fail);
struct pv_disk *pv_disk_open_nbd(struct pv_disks *disks, const char *name, const char *socket, const char *export_name,
    uint32_t patience_ms, struct pv_disk_fail *fail);
int pv_disk_start(struct pv_disk *disk, struct pv_disk_fail *fail);
/* Ends it: no front end, no export, nobody redirects to it, or EBUSY and it goes on. */
int pv_disk_close(struct pv_disk *disk, struct pv_disk_fail *fail);

struct pv_instance *pv_disk_instance(struct pv_disk *disk);
uint64_t pv_disk_size(const struct pv_disk *disk);
uint32_t pv_disk_block_size(const struct pv_disk *disk);

/* The chain. `pause_ns` (may be NULL): how long requests waited. A filter's place: 0 is nearest to the guest. */
int pv_disk_add(struct pv_disk *disk, const char *filter, const char *name, const struct pv_disk_setting *settings, unsigned count,
    unsigned at, uint64_t *pause_ns, struct pv_disk_fail *fail);
int pv_disk_remove(struct pv_disk *disk, const char *name, uint64_t *pause_ns, struct pv_disk_fail *fail);
int pv_disk_set(struct pv_disk *disk, const char *name, const struct pv_disk_setting *settings, unsigned count, uint64_t *pause_ns,
    struct pv_disk_fail *fail);
int pv_disk_resize(struct pv_disk *disk, uint64_t size, uint64_t *pause_ns, struct pv_disk_fail *fail);

/* A filter's first state on disk, for a disk of that size; and what filters there are. */
int pv_disk_create_state(const char *filter, const struct pv_disk_setting *settings, unsigned count, uint64_t size,
    struct pv_disk_fail *fail);
struct pv_disk_class {
    const char *name;
    int order; /* 0 inspection, 1 caching, 2 compression, 3 encryption, 4 replication */
    bool persistent;
};
/* False: there are no more. */
bool pv_disk_class(unsigned index, struct pv_disk_class *out);

/* Figures of a filter, or (name NULL) of the instance itself. Returns how many, at most max; -1: no such filter. */
int pv_disk_figures(struct pv_disk *disk, const char *name, struct pv_disk_figure *out, unsigned max, struct pv_disk_fail *fail);

/* An NBD export on a listening socket, which becomes its own (also on failure). `at`: the filter whose downstream it
 * shows, or NULL:
 * the whole disk. */
struct pv_nbd_server *pv_disk_export(struct pv_disk *disk, const char *at, const char *export_name, int listener, bool read_only,
    struct pv_disk_fail *fail);
void pv_disk_unexport(struct pv_disk *disk, struct pv_nbd_server *server); /* waits for the requests under way */

#endif
