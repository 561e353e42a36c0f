/* Data in anonymous memory: what tests and benches put below a chain. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "data.h"

struct memory {
    struct pv_data data;
    uint8_t *bytes;
};

static void submit(struct pv_data *data, struct pv_io *io)
{
    struct memory *memory = (struct memory *)data;
    int error = 0;

    if (io->offset > data->size || io->length > data->size - io->offset)
        error = EIO;
    else if (io->type == PV_IO_READ)
        pv_iov_copy_in(io->iov, io->iov_count, 0, memory->bytes + io->offset, io->length);
    else if (io->type == PV_IO_WRITE)
        pv_iov_copy_out(io->iov, io->iov_count, 0, memory->bytes + io->offset, io->length);
    else if (io->type != PV_IO_FLUSH)
        memset(memory->bytes + io->offset, 0, io->length);
    pv_io_end(io, error);
}

static void close_memory(struct pv_data *data)
{
    struct memory *memory = (struct memory *)data;

    munmap(memory->bytes, data->size);
    free(memory);
}

static int resize(struct pv_data *data, uint64_t size, struct pv_fail *fail)
{
    struct memory *memory = (struct memory *)data;
    void *bytes = mremap(memory->bytes, data->size, size, MREMAP_MAYMOVE);

    if (bytes == MAP_FAILED)
        return pv_fail(fail, errno, "%llu bytes of memory: %s", (unsigned long long)size, strerror(errno));
    memory->bytes = bytes;
    return 0;
}

static const struct pv_data_class memory_class = {
    .name = "memory", .submit = submit, .close = close_memory, .resize = resize};

struct pv_data *pv_data_memory(uint64_t size, struct pv_fail *fail)
{
    struct memory *memory = calloc(1, sizeof(*memory));

    if (memory)
        memory->bytes = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (!memory || memory->bytes == MAP_FAILED) {
        pv_fail(fail, ENOMEM, "%llu bytes of memory: %s", (unsigned long long)size, strerror(errno));
        free(memory);
        return NULL;
    }
    memory->data = (struct pv_data){.class = &memory_class, .size = size, .block_size = PV_SECTOR};
    return &memory->data;
}
