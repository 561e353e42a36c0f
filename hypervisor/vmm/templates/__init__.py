"""Templates: a booted guest on disk, from which clones start in a few tenths of a second.

`template`: what one is, and how it is read and checked. `store`: which there are; one builder at a time. `build`: boots
a guest and takes it. How a clone is started from one stands in `hypervisor.vmm.launch`.
"""
