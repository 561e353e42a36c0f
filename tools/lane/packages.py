"""What L1 consists of, as data."""

from __future__ import annotations

KERNEL_METAPACKAGE = "linux-image-cloud-amd64"

#: with everything that they depend on; nothing that they recommend
ROOT_PACKAGES = (
    "bash",
    "busybox-static",
    "coreutils",
    "e2fsprogs",
    "grep",
    "erofs-utils",
    "iproute2",
    "libc6",
    "mount",
    "procps",
    "python3",
    "qemu-system-x86",
    "skopeo",
    "sed",
    "tar",
    "util-linux",
)

#: what such packages depend on and no test uses: signing, sound, pictures, package management
LEFT_OUT = (
    "debconf", "dirmngr", "gnupg", "gpg", "gpgsm", "gstreamer1.0-plugins-base", "init-system-helpers",
    "initramfs-tools", "initramfs-tools-core", "iso-codes", "linux-base", "perl-base", "pinentry-curses",
)  # fmt: skip

#: folders of the root that nothing reads there
USELESS = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "boot", "lib/modules")

#: loaded by L1's init, in this order, each behind what it depends on
MODULES = (
    "virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci", "virtio_blk",
    "virtio_rng", "erofs", "overlay", "kvm_amd", "vhost_vsock", "tun", "loop",
)  # fmt: skip

#: of setup.cfg's extra ``test``: what the lane's tests import
TEST_REQUIREMENTS = ("pytest", "pytest-asyncio", "pytest-cov", "pytest-timeout", "hypothesis", "wsproto")
