/* clone3() with the semantics of vfork(), inlined into its caller: the child goes on in the caller's own stack frame. */
#ifndef HV_CLONE_H
#define HV_CLONE_H

#include <errno.h>
#include <linux/sched.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>

#ifndef CLONE_INTO_CGROUP
#define CLONE_INTO_CGROUP 0x200000000ULL
#endif

/* The kernel call itself must not be in a function of its own: the child would return from it and overwrite the return
 * address that the parent still needs. */
static inline __attribute__((always_inline)) long hv_raw_clone3(struct clone_args *args, size_t size)
{
#if defined(__x86_64__)
    long result;

    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"((long)SYS_clone3), "D"(args), "S"(size)
                     : "rcx", "r11", "memory");
    return result;
#elif defined(__aarch64__)
    register long number __asm__("x8") = SYS_clone3;
    register long first __asm__("x0") = (long)args;
    register long second __asm__("x1") = (long)size;

    __asm__ volatile("svc 0" : "+r"(first) : "r"(number), "r"(second) : "memory", "cc");
    return first;
#else
#error "clone3 is not written for this machine"
#endif
}

/* 0 in the child, which must end in execve() or _exit() and must not return; in the parent, when the child has done so, its
 * pid, or -errno. The child is a child of our own parent; it is born in the cgroup `cgroup` (a directory) unless that is -1. */
static inline __attribute__((always_inline)) pid_t hv_clone_vfork(int cgroup)
{
    struct clone_args args = {.flags = CLONE_VM | CLONE_VFORK | CLONE_PARENT};

    if (cgroup >= 0) {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = (uint64_t)cgroup;
    }
    return (pid_t)hv_raw_clone3(&args, sizeof(args));
}

#endif
