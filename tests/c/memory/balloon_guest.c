/* /init of a guest with a memory balloon: loads its modules, says that it is up, and idles. */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static const char *const modules[] = {"virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci",
                                      "virtio_balloon"};

int main(void)
{
    for (size_t i = 0; i < sizeof modules / sizeof *modules; i++) {
        char path[64];
        int fd;

        snprintf(path, sizeof path, "/modules/%s.ko", modules[i]);
        fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0 || syscall(SYS_finit_module, fd, "", 0))
            printf("cannot load %s: %m\n", path);
        close(fd);
    }
    printf("balloon guest is up\n");
    for (;;)
        pause();
}
