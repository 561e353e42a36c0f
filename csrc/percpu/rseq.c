/* See rseq.h. */
#include "rseq.h"

#include <errno.h>
#include <linux/membarrier.h>
#include <linux/rseq.h>
#include <pthread.h>
#include <sys/auxv.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__aarch64__)
#define SIGNATURE 0xd428bc00U
#else
#define SIGNATURE 0x53053053U
#endif
#ifndef PR_RSEQ_SLICE_EXTENSION
#define PR_RSEQ_SLICE_EXTENSION 79
#define PR_RSEQ_SLICE_EXTENSION_SET 2
#define PR_RSEQ_SLICE_EXT_ENABLE 1
#endif
#ifndef AT_RSEQ_FEATURE_SIZE
#define AT_RSEQ_FEATURE_SIZE 27
#endif
#ifndef SYS_rseq_slice_yield
#define SYS_rseq_slice_yield 471
#endif

/* glibc's, where it has them. */
extern const ptrdiff_t __rseq_offset __attribute__((weak));
extern const unsigned int __rseq_size __attribute__((weak));

struct own_area {
    struct rseq kernel;
    char later_fields[32];
};

/* Initial-exec: in a library that is loaded late, too, the distance from the thread pointer is one number for all threads. */
static __thread struct own_area own_area __attribute__((tls_model("initial-exec"), aligned(64))) = {
    .kernel = {.cpu_id = (uint32_t)RSEQ_CPU_ID_UNINITIALIZED},
};
static __thread bool own_tried;
static bool libc_registers;
static bool fence_ready;

ptrdiff_t pv_rseq_offset;
uint64_t pv_percpu_aborts;

__attribute__((constructor)) static void find_area(void)
{
    libc_registers = &__rseq_size && __rseq_size;
    pv_rseq_offset = libc_registers ? __rseq_offset : (char *)&own_area - (char *)__builtin_thread_pointer();
}

static struct rseq *thread_area(void)
{
    return (struct rseq *)((char *)__builtin_thread_pointer() + pv_rseq_offset);
}

static bool registered(void)
{
    return (int32_t)__atomic_load_n(&thread_area()->cpu_id, __ATOMIC_RELAXED) >= 0;
}

/* What older kernels know is 32 bytes; one that has more fields wants to hear that there is room for all of them. */
static uint32_t own_length(void)
{
    unsigned long wanted = getauxval(AT_RSEQ_FEATURE_SIZE);

    return wanted > sizeof own_area.kernel && wanted <= sizeof own_area ? sizeof own_area : sizeof own_area.kernel;
}

bool pv_rseq_register_thread(void)
{
    int saved = errno;

    if (registered())
        return true;
    if (libc_registers || own_tried)
        return false;
    own_tried = true;
    if (syscall(SYS_rseq, &own_area.kernel, own_length(), 0, SIGNATURE))
        own_area.kernel.cpu_id = (uint32_t)RSEQ_CPU_ID_REGISTRATION_FAILED;
    errno = saved;
    return registered();
}

enum pv_rseq_origin pv_rseq_origin(void)
{
    return !registered() ? PV_RSEQ_NONE : libc_registers ? PV_RSEQ_LIBC : PV_RSEQ_OWN;
}

static int membarrier(int command)
{
    return (int)syscall(SYS_membarrier, command, 0, 0);
}

int pv_rseq_fence(void)
{
    if (!__atomic_load_n(&fence_ready, __ATOMIC_RELAXED)) {
        if (membarrier(MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED_RSEQ))
            return -1;
        __atomic_store_n(&fence_ready, true, __ATOMIC_RELAXED);
    }
    return membarrier(MEMBARRIER_CMD_PRIVATE_EXPEDITED_RSEQ) ? -1 : 0;
}

/* ---- time-slice extension ---------------------------------------------------------------------------------------- */

struct slice_ctrl {
    uint8_t request, granted;
    uint16_t reserved;
};

static volatile struct slice_ctrl *slice_ctrl(void)
{
    return (volatile struct slice_ctrl *)((char *)thread_area() + PV_RSEQ_SLICE_CTRL);
}

int pv_slice_supported(void)
{
    if (!pv_rseq_register_thread())
        return ENOSYS;
    if (prctl(PR_RSEQ_SLICE_EXTENSION, PR_RSEQ_SLICE_EXTENSION_SET, PR_RSEQ_SLICE_EXT_ENABLE, 0, 0))
        return errno;
    return 0;
}

/* Of this thread: not asked yet, asked and refused, granted. */
static __thread enum { SLICE_UNKNOWN, SLICE_NONE, SLICE_OFFERED } slice;

static bool slice_offered(void)
{
    int saved;

    if (__builtin_expect(slice == SLICE_UNKNOWN, 0)) {
        saved = errno;
        slice = pv_slice_supported() ? SLICE_NONE : SLICE_OFFERED;
        errno = saved;
    }
    return slice == SLICE_OFFERED;
}

void pv_slice_begin(void)
{
    if (!slice_offered())
        return;
    slice_ctrl()->request = 1;
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
}

void pv_slice_end(void)
{
    if (slice != SLICE_OFFERED)
        return;
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    slice_ctrl()->request = 0;
    if (slice_ctrl()->granted)
        syscall(SYS_rseq_slice_yield);
}
