"""Virtual disks: descriptors, chains of I/O filters, NBD exports (faces of csrc/iofilter and csrc/nbd). Knows no VMs."""
