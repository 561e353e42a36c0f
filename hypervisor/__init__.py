"""podvisor: a bare-metal-style hypervisor, emulated with QEMU, that runs every pod in a VM of its own."""
