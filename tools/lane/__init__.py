"""The KVM lane: tests that need KVM and the kernel's vhost-vsock, run on any machine (docs/testing.md).

Where KVM works the tests run at once. Elsewhere a guest ("L1") is booted under TCG, which emulates AMD's
virtualization, and they run in there: for the code under test L1 is a KVM host. Modules: `packages` (what L1 consists
of, as data), `rootdisk` (Debian packages only, kept by the digest of its inputs), `project` (this project, its
dependencies, guest image and tests: the second disk), `machine` (boots L1 and brings results back), `inside/` (what
runs there), `__main__`.
"""
