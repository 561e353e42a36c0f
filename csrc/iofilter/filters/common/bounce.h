/* Requests that must pass through a buffer: because a filter changes the bytes (encrypt), because what it computes of them must be of
 * exactly the bytes that are stored (integrity), or because they go to two places (mirror). A guest may change its memory at any time; these
 * buffers it cannot reach.
 *
 * Theory of operation
 * -------------------
 * A request becomes a *job*, which goes through its range in *chunks* of whole blocks (PV_BLOCK), each with a buffer from a bounded pool:
 *
 *     read               read the chunk into the buffer -> class->open -> copy to the request
 *     write, whole       copy from the request -> class->seal -> write -> class->written
 *     write, a part      read the block -> class->open -> copy the part over it -> class->seal -> write -> class->written
 *     zeroes, whole      class->seal without a buffer -> zeroes go on as zeroes -> class->written
 *     discard            the whole blocks only; likewise
 *
 * and ends by class->end. Some chunks of a job are under way at once; what finds no buffer waits its turn.
 *
 * A job that must read before it writes has its blocks alone among the jobs that write (as have all, if class->alone): later ones wait.
 *
 * Bounds: PV_BOUNCE_BUFFERS buffers of PV_BOUNCE_SIZE a filter, PV_BOUNCE_CHUNKS chunks a job. Idle, it keeps PV_BOUNCE_SPARE of them.
 */
#ifndef PV_BOUNCE_H
#define PV_BOUNCE_H

#include "../all.h"

#define PV_BLOCK 4096u
#define PV_BOUNCE_SIZE (128u << 10)
#define PV_BOUNCE_ZEROES (64ull << 20) /* most bytes of a chunk without a buffer: a class may look at each block */
#define PV_BOUNCE_BUFFERS 64
#define PV_BOUNCE_SPARE 4
#define PV_BOUNCE_CHUNKS 4

struct pv_job;

struct pv_chunk {
    struct pv_job *job;
    enum pv_io_type type;
    uint64_t start, length; /* whole blocks of the disk, bytes */
    uint64_t from, to;      /* the part of it that is the request's */
    uint8_t *buffer;        /* NULL: zeroes or a discard */
    struct iovec iov;
    int error;
    unsigned under_way;     /* for a class that sends it to more than one place */
    struct pv_link link;
};

struct pv_bounce;

struct pv_bounce_class {
    bool alone; /* no two jobs that write are on one block at a time */
    /* What was read is made plain, in the buffer, or it is an error: a positive errno. NULL: it is plain. */
    int (*open)(struct pv_bounce *bounce, struct pv_chunk *chunk);
    /* The same for a read, with the copy to the request. NULL: open and a copy. EINPROGRESS: it is not over before pv_bounce_delivered. */
    int (*deliver)(struct pv_bounce *bounce, struct pv_chunk *chunk);
    /* What is to be written is made ready, in the buffer (NULL: zeroes, or a discard). NULL: it is. 0, or a positive errno. */
    int (*seal)(struct pv_bounce *bounce, struct pv_chunk *chunk);
    /* The same for a whole write, with the copy from the request. NULL: a copy and seal. */
    int (*collect)(struct pv_bounce *bounce, struct pv_chunk *chunk);
    /* Sends a chunk that is ready; pv_bounce_sent when that is over. NULL: one child downstream. */
    void (*send)(struct pv_bounce *bounce, struct pv_chunk *chunk);
    /* It was written, or it was not (chunk->error). NULL: nobody asks. */
    void (*written)(struct pv_bounce *bounce, struct pv_chunk *chunk);
    /* All is over. NULL: pv_io_end. */
    void (*end)(struct pv_bounce *bounce, struct pv_io *io, int error);
};

struct pv_bounce {
    struct pv_filter *filter;
    const struct pv_bounce_class *class;
    struct pv_link spare, starved; /* struct pv_chunk; struct pv_job */
    unsigned buffers, spares;
    struct pv_link writers, waiting; /* struct pv_job: under way, and those that wait for their blocks */
    struct pv_task wake;
};

void pv_bounce_init(struct pv_bounce *bounce, struct pv_filter *filter, const struct pv_bounce_class *class);
void pv_bounce_detach(struct pv_bounce *bounce); /* in the class's `detach` */
void pv_bounce_free(struct pv_bounce *bounce); /* no job is under way */
void pv_bounce_request(struct pv_bounce *bounce, struct pv_io *io);
/* A read that has its blocks alone: for one that has to know that no write was under way. */
void pv_bounce_read_alone(struct pv_bounce *bounce, struct pv_io *io);

/* ---- for the class's functions ---- */

struct pv_io *pv_chunk_io(const struct pv_chunk *chunk);
void pv_chunk_copy_in(struct pv_chunk *chunk);  /* the request's part, into the buffer */
void pv_chunk_copy_out(struct pv_chunk *chunk); /* and back */
/* For `send`: a child of this chunk, for this filter; `done` gets it with the chunk as its owner. NULL: no memory. */
struct pv_io *pv_chunk_child(struct pv_bounce *bounce, struct pv_chunk *chunk, void (*done)(struct pv_io *));
void pv_bounce_sent(struct pv_bounce *bounce, struct pv_chunk *chunk);
void pv_bounce_delivered(struct pv_bounce *bounce, struct pv_chunk *chunk);
bool pv_job_is_alone(const struct pv_chunk *chunk);
/* Whether a job that writes has blocks of this range. */
bool pv_bounce_writes(const struct pv_bounce *bounce, uint64_t start, uint64_t length);
/* Whether a job on this range (that fits a buffer) would begin at once: nobody writes there or waits to, and there is a buffer. */
bool pv_bounce_is_free(const struct pv_bounce *bounce, uint64_t start, uint64_t length);

#endif
