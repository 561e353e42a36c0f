/* Data in a file or on a block device.
 *
 * Theory of operation
 * -------------------
 * A request is tried at once, without waiting, and if that does not settle it, it is one operation of the ring
 * (uring.h):
 *
 *     at once    preadv2 or pwritev2 with RWF_NOWAIT: what the page cache has needs no more than this one call. Memory
 *                file systems (tmpfs) do not know the flag, and the ring hands all they do to a kernel thread, which
 *                takes ten times as long as the copy itself; they never wait for a device, so there the flag is left
 *                out, and a flush has nothing to do
 *     the ring   all else: direct I/O, requests longer than AT_ONCE_MAX (which would keep the loop from other
 *                requests), durable writes, what the page cache does not have. After a miss the next ones go
 *                straight to the ring, twice as many after each further miss, so that a random read of a cold file
 *                costs no call in vain
 *
 * Only a complete success counts at once: anything else is done again by the ring from the beginning, which is
 * harmless for reads and for writes that nobody has been told of, and its result is the request's.
 *
 * In the ring there are three exceptions from one operation a request:
 *  - what comes back short goes on where it stopped; a read that gets nothing where there should be data is EIO (the
 *    file was cut under us), never zeroes;
 *  - with O_DIRECT, segments that the kernel would refuse (memory not aligned) go through a buffer;
 *  - a file system that cannot punch or zero a range: a discard is dropped (it is a hint), zeroes are written.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "common/cleanup.h"
#include "data.h"
#include "uring.h"

#define ZEROES (64u << 10) /* bytes of zeroes that one segment points to */
#define AT_ONCE_MAX (256u << 10)
#define SKIPS_MAX 64 /* most requests of a type that are not tried at once after a miss */

/* Whether a type of request (read, write) is tried at once. */
struct luck {
    bool never;      /* the file system cannot */
    unsigned misses; /* since the last success: 2^misses requests are not tried */
    unsigned skip;   /* of them, still to come */
};

struct file {
    struct pv_data data;
    int fd;
    bool direct, pool, device, queued;
    bool memory; /* of a file system that has no device to wait for */
    struct luck luck[2]; /* PV_IO_READ, PV_IO_WRITE */
    struct pv_uring *uring; /* NULL: there is none, for the reason in `error`: every request ends with it */
    int error;
    struct pv_link spare; /* struct job */
};

/* A request on its way through the file. */
struct job {
    struct pv_op op;
    struct file *file;
    struct pv_io *io;
    uint64_t done;
    bool zeroing; /* writes zeroes in place of the request's range */
    bool syncing; /* the last step: a sync that makes it durable */
    void *bounce;
    struct iovec *rest; /* what is left of the segments, once something came back short */
    struct iovec one;
};

static uint8_t zeroes[ZEROES] __attribute__((aligned(4096)));

static struct job *take_job(struct file *file)
{
    struct job *job;

    if (pv_list_empty(&file->spare))
        return calloc(1, sizeof(*job));
    job = pv_member(file->spare.next, struct job, op.link);
    pv_list_remove(&job->op.link);
    memset(job, 0, sizeof(*job));
    return job;
}

static void end_job(struct job *job, int error)
{
    struct file *file = job->file;
    struct pv_io *io = job->io;

    if (job->bounce && !error && io->type == PV_IO_READ)
        pv_iov_copy_in(io->iov, io->iov_count, 0, job->bounce, io->length);
    free(job->bounce);
    free(job->rest);
    pv_list_append(&file->spare, &job->op.link);
    pv_io_end(io, error);
}

static void sync_job(struct job *job)
{
    job->syncing = true;
    job->op.type = PV_OP_SYNC;
    pv_uring_submit(job->file->uring, &job->op);
}

static void zero_next(struct job *job)
{
    uint64_t left = job->io->length - job->done;

    job->one = (struct iovec){zeroes, left < ZEROES ? left : ZEROES};
    job->op.type = PV_OP_WRITE;
    job->op.offset = job->io->offset + job->done;
    job->op.length = job->one.iov_len;
    job->op.iov = &job->one;
    job->op.iov_count = 1;
    pv_uring_submit(job->file->uring, &job->op);
}

/* Goes on behind what came back short. */
static void go_on(struct job *job)
{
    const struct pv_io *io = job->io;
    struct iovec flat = {job->bounce, io->length};
    const struct iovec *all = job->bounce ? &flat : io->iov;
    unsigned count = job->bounce ? 1 : io->iov_count;

    if (!job->rest)
        job->rest = calloc(count, sizeof(*job->rest));
    if (!job->rest) {
        end_job(job, ENOMEM);
        return;
    }
    job->op.iov_count = pv_iov_cut(all, count, job->done, io->length - job->done, job->rest, count);
    job->op.iov = job->rest;
    job->op.offset = io->offset + job->done;
    job->op.length = io->length - job->done;
    pv_uring_submit(job->file->uring, &job->op);
}

static void moved(struct job *job)
{
    int result = job->op.result;

    if (result == 0) {
        end_job(job, EIO);
        return;
    }
    job->done += (uint64_t)result;
    if (job->done < job->io->length) {
        if (job->zeroing)
            zero_next(job);
        else
            go_on(job);
        return;
    }
    if (job->zeroing && job->io->flags & PV_IO_FUA)
        sync_job(job);
    else
        end_job(job, 0);
}

static void range_done(struct job *job)
{
    int result = job->op.result;

    if (!result && job->io->type == PV_IO_WRITE_ZEROES && job->io->flags & PV_IO_FUA)
        sync_job(job);
    else if (!result)
        end_job(job, 0);
    else if (result != -EOPNOTSUPP && result != -ENODEV)
        end_job(job, -result);
    else if (job->io->type == PV_IO_DISCARD)
        end_job(job, 0);
    else {
        job->zeroing = true;
        zero_next(job);
    }
}

static void op_done(struct pv_op *op)
{
    struct job *job = pv_member(op, struct job, op);

    if (op->result == -EINTR || op->result == -EAGAIN)
        pv_uring_submit(job->file->uring, op);
    else if (!job->syncing && op->type >= PV_OP_PUNCH)
        range_done(job);
    else if (op->result < 0)
        end_job(job, -op->result);
    else if (op->type == PV_OP_SYNC)
        end_job(job, 0);
    else
        moved(job);
}

static bool aligned(const struct file *file, const struct pv_io *io)
{
    uintptr_t mask = file->data.block_size - 1;

    for (unsigned i = 0; i < io->iov_count; i++)
        if (((uintptr_t)io->iov[i].iov_base | io->iov[i].iov_len) & mask)
            return false;
    return true;
}

static int use_bounce(struct job *job)
{
    struct pv_io *io = job->io;

    if (posix_memalign(&job->bounce, 4096, io->length)) {
        job->bounce = NULL;
        return -1;
    }
    if (io->type == PV_IO_WRITE)
        pv_iov_copy_out(io->iov, io->iov_count, 0, job->bounce, io->length);
    job->one = (struct iovec){job->bounce, io->length};
    job->op.iov = &job->one;
    job->op.iov_count = 1;
    return 0;
}

static ssize_t move_now(const struct file *file, const struct pv_io *io)
{
    int flags = file->memory ? 0 : RWF_NOWAIT, count = (int)io->iov_count;

    return io->type == PV_IO_READ ? preadv2(file->fd, io->iov, count, (off_t)io->offset, flags)
                                  : pwritev2(file->fd, io->iov, count, (off_t)io->offset, flags);
}

/* True: it was done. */
static bool at_once(struct file *file, const struct pv_io *io)
{
    struct luck *luck = &file->luck[io->type];
    ssize_t got;

    if (luck->never || io->length > AT_ONCE_MAX || (io->flags & PV_IO_FUA && !file->memory))
        return false;
    if (luck->skip) {
        luck->skip--;
        return false;
    }
    got = move_now(file, io);
    if (got == (ssize_t)io->length) {
        luck->misses = 0;
        return true;
    }
    luck->never = got < 0 && (errno == EOPNOTSUPP || errno == ENOSYS);
    luck->skip = 1u << luck->misses;
    if (luck->skip < SKIPS_MAX)
        luck->misses++;
    return false;
}

static const enum pv_op_type operations[PV_IO_TYPES] = {[PV_IO_READ] = PV_OP_READ, [PV_IO_WRITE] = PV_OP_WRITE,
    [PV_IO_FLUSH] = PV_OP_SYNC, [PV_IO_DISCARD] = PV_OP_PUNCH, [PV_IO_WRITE_ZEROES] = PV_OP_ZERO};

static void submit(struct pv_data *data, struct pv_io *io)
{
    struct file *file = (struct file *)data;
    bool moves = io->type <= PV_IO_WRITE;
    struct job *job;

    if (!file->uring || (moves && !io->length)) {
        pv_io_end(io, file->error);
        return;
    }
    if (!file->queued && (moves ? at_once(file, io) : file->memory && io->type == PV_IO_FLUSH)) {
        pv_io_end(io, 0);
        return;
    }
    job = take_job(file);
    if (!job) {
        pv_io_end(io, ENOMEM);
        return;
    }
    job->file = file;
    job->io = io;
    job->op = (struct pv_op){.type = operations[io->type], .fd = file->fd, .offset = io->offset, .length = io->length,
        .iov = io->iov, .iov_count = io->iov_count, .done = op_done,
        .durable = io->type == PV_IO_WRITE && io->flags & PV_IO_FUA};
    if (io->type == PV_IO_WRITE_ZEROES && io->flags & PV_IO_UNMAP)
        job->op.type = PV_OP_PUNCH;
    if (file->direct && moves && !aligned(file, io) && use_bounce(job)) {
        end_job(job, ENOMEM);
        return;
    }
    pv_uring_submit(file->uring, &job->op);
}

static void attached(struct pv_data *data, struct pv_loop *loop)
{
    struct file *file = (struct file *)data;
    int err;

    file->uring = pv_uring_get(loop, file->pool, &err);
    file->error = file->uring ? 0 : err;
}

static void detach(struct pv_data *data)
{
    struct file *file = (struct file *)data;

    if (file->uring)
        pv_uring_put(file->uring);
    file->uring = NULL;
}

static void close_file(struct pv_data *data)
{
    struct file *file = (struct file *)data;

    while (!pv_list_empty(&file->spare)) {
        struct job *job = pv_member(file->spare.next, struct job, op.link);

        pv_list_remove(&job->op.link);
        free(job);
    }
    close(file->fd);
    free(file);
}

static int resize(struct pv_data *data, uint64_t size, struct pv_fail *fail)
{
    struct file *file = (struct file *)data;

    if (file->device)
        return pv_fail(fail, ENOTSUP, "a block device has the size it has");
    if (ftruncate(file->fd, (off_t)size))
        return pv_fail(fail, errno, "cannot make the file %llu bytes long: %s", (unsigned long long)size, strerror(errno));
    return 0;
}

static const struct pv_data_class file_class = {.name = "file", .submit = submit, .attached = attached, .detach = detach,
    .close = close_file, .resize = resize};

static bool in_memory(int fd)
{
    struct statfs system;

    return !fstatfs(fd, &system) && system.f_type == TMPFS_MAGIC;
}

static int measure(struct file *file, struct pv_fail *fail)
{
    struct stat status;
    uint64_t size;

    if (fstat(file->fd, &status))
        return pv_fail(fail, errno, "cannot look at the file: %s", strerror(errno));
    file->device = S_ISBLK(status.st_mode);
    if (!file->device && !S_ISREG(status.st_mode))
        return pv_fail(fail, EINVAL, "neither a file nor a block device");
    size = (uint64_t)status.st_size;
    if (file->device && ioctl(file->fd, BLKGETSIZE64, &size))
        return pv_fail(fail, errno, "cannot ask the device for its size: %s", strerror(errno));
    file->data.size = size / file->data.block_size * file->data.block_size;
    file->memory = in_memory(file->fd);
    return 0;
}

struct pv_data *pv_data_file(int fd, unsigned how, struct pv_fail *fail)
{
    cleanup_fd int owned = fd;
    cleanup_free struct file *file = calloc(1, sizeof(*file));

    if (!file) {
        pv_fail(fail, ENOMEM, "no memory for a file");
        return NULL;
    }
    file->fd = fd;
    file->direct = how & PV_FILE_DIRECT;
    file->pool = how & PV_FILE_POOL;
    file->queued = how & (PV_FILE_QUEUED | PV_FILE_DIRECT);
    file->data = (struct pv_data){.class = &file_class, .block_size = PV_SECTOR, .read_only = how & PV_FILE_READ_ONLY};
    pv_list_init(&file->spare);
    if (measure(file, fail))
        return NULL;
    if (file->direct && fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_DIRECT)) {
        pv_fail(fail, errno, "the file system has no direct I/O: %s", strerror(errno));
        return NULL;
    }
    steal_fd(&owned);
    return &steal_pointer(&file)->data;
}
