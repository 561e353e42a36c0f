"""The device process of one VM, and the zygote it is forked from."""
