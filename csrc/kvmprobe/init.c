/* The init of the probe's second stage: says on the console that user mode was reached under a real kernel, then
 * restarts the machine, which ends QEMU. Built without libc, so that its initramfs is a few kilobytes. */
#include <linux/reboot.h>
#include <sys/syscall.h>

static const char marker[] = "\nhv-kvm-probe: user mode reached\n";

static long call(long number, long a, long b, long c)
{
#if defined(__x86_64__)
    long result;

    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
    return result;
#elif defined(__aarch64__)
    register long x8 __asm__("x8") = number;
    register long x0 __asm__("x0") = a;
    register long x1 __asm__("x1") = b;
    register long x2 __asm__("x2") = c;

    __asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2) : "memory");
    return x0;
#endif
}

void _start(void);

void _start(void)
{
    call(SYS_write, 1, (long)marker, sizeof marker - 1);
    call(SYS_reboot, (long)LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, LINUX_REBOOT_CMD_RESTART);
    call(SYS_exit, 1, 0, 0);
    __builtin_unreachable();
}
