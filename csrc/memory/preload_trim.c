/* Preloaded into QEMU: gives back memory that an idle guest does not need, its translated code above all.
 *
 * Theory of operation
 * -------------------
 * TCG keeps every block that it ever translated: after a start some 45 MiB of private memory and 10 MiB of tables, nearly half of an
 * idle VM, most of it code that ran once. QEMU can throw all of it away (tb_flush), but has no command for it, and keeps the memory.
 *
 *      host daemon: the guest idles --PV_TRIM_SIGNAL--> thread here --tb_flush, then give_back--> a vCPU's queue of safe work
 *
 * Safe work runs while no vCPU is in translated code. The flush comes first in the same queue, so when give_back runs, nothing refers to
 * a block any more: the memory behind the prologue, which stays, is given back to the kernel, and what runs next is translated anew.
 *
 * The signal is blocked in every thread from the start on, and taken by this one alone; sent to a QEMU whose functions were not found (it
 * exports them for its modules), or that uses no TCG, it does nothing.
 */
#include "preload.h"

#include <dlfcn.h>
#include <malloc.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PROLOGUE_BYTES (64u << 10) /* more than QEMU has of it, at the buffer's begin */
#define LEAST_REGION (1u << 20)    /* nothing else that QEMU makes executable and writable is as large */
#define LEAST_HUGE (8u << 20)

/* As in QEMU's include/hw/core/cpu.h, from 2.8 on. */
struct cpu;
typedef union {
    int host_int;
    void *host_ptr;
    uint64_t target_ptr;
} work_data;

static struct {
    void (*tb_flush)(struct cpu *);
    void (*async_safe_run_on_cpu)(struct cpu *, void (*)(struct cpu *, work_data), work_data);
    struct cpu *(*qemu_get_cpu)(int);
    int armed;
    char *buffer; /* for translated code, all regions */
    size_t bytes;
    sem_t done;
} trim;

static void give_back(struct cpu *cpu, work_data data)
{
    (void)cpu, (void)data;
    madvise(trim.buffer + PROLOGUE_BYTES, trim.bytes - PROLOGUE_BYTES, MADV_DONTNEED);
    sem_post(&trim.done);
}

static void throw_away(void)
{
    struct cpu *cpu = trim.buffer ? trim.qemu_get_cpu(0) : NULL;

    if (!cpu)
        return;
    trim.tb_flush(cpu);
    trim.async_safe_run_on_cpu(cpu, give_back, (work_data){0});
    while (sem_wait(&trim.done))
        ; /* EINTR */
    malloc_trim(0);
}

static void *serve(void *signals)
{
    int number;

    for (;;)
        if (!sigwait(signals, &number))
            throw_away();
    return NULL;
}

/* QEMU reserves its buffer without access, and makes its regions (one a vCPU, or one in all) executable in order. */
static void note_executable(char *start, size_t length)
{
    if (!trim.buffer && length >= LEAST_REGION)
        trim.buffer = start;
    if (trim.buffer && start >= trim.buffer && start + length > trim.buffer + trim.bytes && length >= LEAST_REGION)
        trim.bytes = (size_t)(start + length - trim.buffer);
}

__attribute__((visibility("default"))) int mprotect(void *start, size_t length, int protection);

int mprotect(void *start, size_t length, int protection)
{
    int result = (int)syscall(SYS_mprotect, start, length, protection);

    if (!result && trim.armed && protection == (PROT_READ | PROT_WRITE | PROT_EXEC))
        note_executable(start, length);
    return result;
}

__attribute__((visibility("default"))) int madvise(void *start, size_t length, int advice);

/* QEMU wants huge pages for whatever it calls RAM, such as 2 MiB that are reserved for 128 KiB of ACPI tables. Only its buffer for
 * translated code gains by them. */
int madvise(void *start, size_t length, int advice)
{
    if (advice == MADV_HUGEPAGE && trim.armed && length < LEAST_HUGE)
        return 0;
    return (int)syscall(SYS_madvise, start, length, advice);
}

void pv_trim_start(void)
{
    static sigset_t signals;
    pthread_t thread;

    sigemptyset(&signals);
    sigaddset(&signals, SIGRTMIN + PV_TRIM_SIGNAL);
    if (pthread_sigmask(SIG_BLOCK, &signals, NULL))
        return;
    *(void **)&trim.tb_flush = dlsym(RTLD_DEFAULT, "tb_flush");
    *(void **)&trim.async_safe_run_on_cpu = dlsym(RTLD_DEFAULT, "async_safe_run_on_cpu");
    *(void **)&trim.qemu_get_cpu = dlsym(RTLD_DEFAULT, "qemu_get_cpu");
    if (!trim.tb_flush || !trim.async_safe_run_on_cpu || !trim.qemu_get_cpu || sem_init(&trim.done, 0, 0))
        return;
    trim.armed = !pthread_create(&thread, NULL, serve, &signals) && !pthread_detach(thread);
}
