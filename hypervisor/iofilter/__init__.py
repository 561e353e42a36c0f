"""Virtual disks: descriptors, chains of I/O filters, NBD exports. Faces of csrc/iofilter and csrc/nbd; know no VMs."""
