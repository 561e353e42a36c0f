/* The seccomp filter. It denies, with EPERM, what no VM's process needs and what an attacker reaches for first: the
 * calls that change the view, look into other processes, or open large and rarely used parts of the kernel. QEMU's own
 * `-sandbox on` comes on top of it and is narrower; this one also holds before QEMU has set its own up. */
#include "privileges.h"

#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__x86_64__)
#define FILTER_ARCHITECTURE AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define FILTER_ARCHITECTURE AUDIT_ARCH_AARCH64
#endif

#ifdef FILTER_ARCHITECTURE

/* Numbers that are the same everywhere, for headers older than the call. */
#ifndef SYS_mount_setattr
#define SYS_mount_setattr 442
#endif
#ifndef SYS_process_madvise
#define SYS_process_madvise 440
#endif

static const unsigned denied[] = {
    /* other processes */
    SYS_ptrace,
    SYS_process_vm_readv,
    SYS_process_vm_writev,
    SYS_process_madvise,
    SYS_pidfd_getfd,
    SYS_pidfd_send_signal,
    SYS_kcmp,
    SYS_migrate_pages,
    SYS_tkill,
    SYS_move_pages,
    /* the view */
    SYS_mount,
    SYS_umount2,
    SYS_open_tree,
    SYS_move_mount,
    SYS_mount_setattr,
    SYS_fsopen,
    SYS_fsconfig,
    SYS_fsmount,
    SYS_fspick,
    SYS_pivot_root,
    SYS_chroot,
    SYS_unshare,
    SYS_setns,
    SYS_open_by_handle_at,
    SYS_name_to_handle_at,
    /* the kernel at large */
    SYS_bpf,
    SYS_io_uring_setup, /* its operations pass by every filter */
    SYS_io_uring_enter,
    SYS_io_uring_register,
    SYS_perf_event_open,
    SYS_add_key,
    SYS_keyctl,
    SYS_request_key,
    SYS_init_module,
    SYS_finit_module,
    SYS_delete_module,
    SYS_kexec_load,
    SYS_reboot,
    SYS_swapon,
    SYS_swapoff,
    SYS_acct,
    SYS_quotactl,
    SYS_syslog,
    SYS_settimeofday,
    SYS_clock_settime,
    SYS_adjtimex,
    SYS_sethostname,
    SYS_setdomainname,
    SYS_vhangup,
#ifdef __x86_64__
    SYS_kexec_file_load,
    SYS_iopl,
    SYS_ioperm,
    SYS_modify_ldt,
    SYS_uselib,
    SYS_ustat,
    SYS_sysfs,
#endif
};

enum { DENIED_COUNT = sizeof denied / sizeof *denied, MAX_PROGRAM = DENIED_COUNT + 64 };

struct program {
    struct sock_filter code[MAX_PROGRAM];
    unsigned short length;
};

static void emit(struct program *p, struct sock_filter instruction)
{
    p->code[p->length++] = instruction;
}

static void emit_load(struct program *p, size_t offset)
{
    emit(p, (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, (uint32_t)offset));
}

static void emit_return(struct program *p, uint32_t action)
{
    emit(p, (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, action));
}

/* if (loaded == value) return action; */
static void emit_return_if(struct program *p, uint32_t value, uint32_t action)
{
    emit(p, (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, 0, 1));
    emit_return(p, action);
}

/* A program of another architecture (i386 on x86-64) has other numbers for the same calls: it has no business here. */
static void emit_prologue(struct program *p)
{
    emit_load(p, offsetof(struct seccomp_data, arch));
    emit(p, (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, FILTER_ARCHITECTURE, 1, 0));
    emit_return(p, SECCOMP_RET_KILL_PROCESS);
    emit_load(p, offsetof(struct seccomp_data, nr));
#ifdef __x86_64__
    /* x32 numbers */
    emit(p, (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JGE | BPF_K, 0x40000000, 0, 1));
    emit_return(p, SECCOMP_RET_KILL_PROCESS);
#endif
}

/* One compare a call, all to one common return at the end: distances fit a byte as the list is short. */
static void emit_denied(struct program *p)
{
    _Static_assert(DENIED_COUNT < 250, "jump distances are one byte");
    for (size_t i = 0; i < DENIED_COUNT; i++)
        emit(p, (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, denied[i], (uint8_t)(DENIED_COUNT - i), 0));
    emit(p, (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JA, 1, 0, 0));
    emit_return(p, SECCOMP_RET_ERRNO | EPERM);
}

/* clone() only without new namespaces; clone3() hides its flags in memory, where no filter can look: ENOSYS makes libc
 * use clone(). */
static void emit_clone(struct program *p)
{
    uint32_t namespaces =
        CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET;

    emit_return_if(p, SYS_clone3, SECCOMP_RET_ERRNO | ENOSYS);
    emit(p, (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_clone, 0, 3));
    emit_load(p, offsetof(struct seccomp_data, args[0]));
    emit(p, (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, namespaces, 0, 1));
    emit_return(p, SECCOMP_RET_ERRNO | EPERM);
}

/* The call's first argument must name this process: `zero_too` where 0 does so as well. */
static void emit_own_process(struct program *p, uint32_t call, bool zero_too)
{
    emit(p, (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, call, 0, zero_too ? 5 : 4));
    emit_load(p, offsetof(struct seccomp_data, args[0]));
    if (zero_too)
        emit(p, (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 0, 1, 0));
    emit(p, (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)getpid(), 0, 1));
    emit_return(p, SECCOMP_RET_ALLOW);
    emit_return(p, SECCOMP_RET_ERRNO | EPERM);
}

/* Where all VMs run as one user, that user's right to signal and to limit its own processes must not reach from VM to
 * VM. execve keeps the process's number, so it can be written into the filter. */
static void emit_signals(struct program *p)
{
    emit_own_process(p, SYS_kill, false);
    emit_own_process(p, SYS_tgkill, false);
    emit_own_process(p, SYS_rt_sigqueueinfo, false);
    emit_own_process(p, SYS_rt_tgsigqueueinfo, false);
    emit_own_process(p, SYS_prlimit64, true);
}

/* New sockets speak TCP and UDP (user-mode networking) and nothing else; others come as descriptors. Unix sockets would
 * reach the host's abstract ones, and AF_VSOCK the agents of other VMs, which no namespace hides. Pairs of datagram
 * sockets could be connected elsewhere later. */
static void emit_sockets(struct program *p)
{
    emit(p, (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_socket, 0, 5));
    emit_load(p, offsetof(struct seccomp_data, args[0]));
    emit(p, (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AF_INET, 1, 0));
    emit(p, (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AF_INET6, 0, 1));
    emit_return(p, SECCOMP_RET_ALLOW);
    emit_return(p, SECCOMP_RET_ERRNO | EAFNOSUPPORT);
    emit(p, (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_socketpair, 0, 5));
    emit_load(p, offsetof(struct seccomp_data, args[1]));
    emit(p, (struct sock_filter)BPF_STMT(BPF_ALU | BPF_AND | BPF_K, 0xf));
    emit_return_if(p, SOCK_DGRAM, SECCOMP_RET_ERRNO | EPERM);
    emit_return(p, SECCOMP_RET_ALLOW);
}

int filter_install(struct failure *f)
{
    struct program program = {0};
    struct sock_fprog installed;

    emit_prologue(&program);
    emit_denied(&program);
    emit_signals(&program);
    emit_sockets(&program);
    emit_clone(&program);
    emit_return(&program, SECCOMP_RET_ALLOW);
    installed = (struct sock_fprog){.len = program.length, .filter = program.code};
    if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &installed, 0, 0))
        return fail(f, errno, "installing the system call filter");
    return 0;
}

#else

int filter_install(struct failure *f)
{
    return fail(f, ENOSYS, "the system call filter is not written for this architecture");
}

#endif
