/* What a filter is: a class (one a folder below filters/) and its instances in chains.
 *
 * The classes' order, from the guest to the data, is fixed: what is inspected is what the guest sends, what is cached
 * is not yet compressed, what is replicated is what is stored. A chain that breaks it is refused when it is made.
 * Within one order the descriptor's own order counts.
 */
#ifndef PV_FILTER_H
#define PV_FILTER_H

#include "common/loop.h"
#include "io.h"

/* PV_ANYWHERE: for what looks on or injects faults, at any depth. */
enum pv_filter_order { PV_INSPECTION, PV_CACHING, PV_COMPRESSION, PV_ENCRYPTION, PV_REPLICATION, PV_ANYWHERE };

/* A setting as it stands in the disk's descriptor: both strings are UTF-8, neither is trusted. */
struct pv_setting {
    const char *name, *value;
};

struct pv_settings {
    const struct pv_setting *list;
    unsigned count;
};

/* Why something was refused: one sentence for a person, who knows which disk and which filter. */
struct pv_fail {
    int error; /* positive errno */
    char text[240];
};

/* A figure that a filter (or an instance) shows: `hv top --disks`, /metrics. */
struct pv_figure {
    char name[32];
    uint64_t value;
};

struct pv_filter_class {
    const char *name;
    enum pv_filter_order order;
    size_t size;       /* of the filter's own struct, whose first member is a struct pv_filter */
    uint32_t types;    /* 1 << PV_IO_*: requests of other types pass by without a call */
    bool persistent;   /* without it the disk's data would be wrong: a disk that names it is not opened without it */

    /* Makes its persistent state for a disk of `size` bytes, when it is put into a disk's descriptor: once, before
     * the first open. May block. NULL: it has none. -1: *fail, and nothing was made. */
    int (*create)(const struct pv_settings *settings, uint64_t size, struct pv_fail *fail);

    /* Called by the thread that opens the disk, not by the loop: may block. filter->instance is set, its size is that
     * of what lies downstream; filter->size may be made smaller (room for the filter's own data at the end). -1:
     * *fail says why,
     * nothing is held. */
    int (*open)(struct pv_filter *filter, const struct pv_settings *settings, struct pv_fail *fail);
    /* Likewise; no request is with the filter. Persistent state is on disk when it returns. May be NULL. */
    void (*close)(struct pv_filter *filter);

    /* On the loop. */
    void (*attached)(struct pv_filter *filter); /* it is in the chain now: timers may be armed. May be NULL */
    void (*detach)(struct pv_filter *filter);   /* it leaves the chain: disarm timers. May be NULL */
    void (*request)(struct pv_filter *filter, struct pv_io *io);
    /* A request that it passed on comes back: look at or change io->error, no more. NULL: not asked. */
    void (*completed)(struct pv_filter *filter, struct pv_io *io);
    /* The instance wants to be quiet: let go of what you hold, end your own children, and hold nothing until it is
     * running again (pv_instance.state). NULL: it holds nothing. */
    void (*drain)(struct pv_filter *filter);
    /* While quiet: other settings (all of them, as for open). -1: *fail, and the old ones are in force. NULL:
     * cannot. */
    int (*set)(struct pv_filter *filter, const struct pv_settings *settings, struct pv_fail *fail);
    /* While quiet: what lies downstream has another size now. NULL: filter->size follows it. */
    void (*resized)(struct pv_filter *filter, uint64_t size);
    unsigned (*figures)(const struct pv_filter *filter, struct pv_figure *out, unsigned max); /* may be NULL */
};

struct pv_filter {
    const struct pv_filter_class *class;
    struct pv_instance *instance;
    unsigned at;        /* its place in the chain */
    unsigned children;  /* requests of its own that are under way */
    uint64_t size;      /* of the disk as seen from upstream, bytes */
    uint64_t below;     /* of what lies downstream, as the filter last heard */
    unsigned handles;   /* programs that enter right below it: it cannot go while there are any */
    char name[64];      /* unique in its chain */
};

/* The class of that name, or NULL. The table is in classes.c. */
const struct pv_filter_class *pv_filter_class(const char *name);
const struct pv_filter_class *pv_filter_class_at(unsigned index);
/* The class's `create`; a class without one has nothing to make. */
int pv_filter_create(const char *class, const struct pv_settings *settings, uint64_t size, struct pv_fail *fail);

/* Readers of settings. pv_settings_known: all names are in the NULL-ended list, or *fail names the first that is not.
 * The others: the value, or
 * `otherwise` when it is not set; -1 with *fail when it is malformed or outside of low..high. Sizes take the suffixes
 * K, M, G, T (binary). */
int pv_settings_known(const struct pv_settings *settings, const char *const *names, struct pv_fail *fail);
const char *pv_setting_text(const struct pv_settings *settings, const char *name, const char *otherwise);
int pv_setting_size(const struct pv_settings *settings, const char *name, uint64_t otherwise, uint64_t low, uint64_t high,
    uint64_t *out, struct pv_fail *fail);
int pv_setting_real(const struct pv_settings *settings, const char *name, double otherwise, double low, double high,
    double *out, struct pv_fail *fail);

/* Always -1. */
int pv_fail(struct pv_fail *fail, int error, const char *format, ...) __attribute__((format(printf, 3, 4)));

#endif
