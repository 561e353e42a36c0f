"""What goes into the images, as data: Debian packages, kernel modules, parts of Python's library."""

from __future__ import annotations

# Its only dependency is the kernel package of the day, which is what gets unpacked.
KERNEL_METAPACKAGE = "linux-image-cloud-amd64"

# For building crun (crun.py): headers and archives.
BUILD_PACKAGES = ("libcap-dev", "libseccomp-dev", "libyajl-dev")

# The agent's root. Not a closure of Debian dependencies but of what is really loaded: the build checks that each shared
# library named by a packed program is there, and names the one that is missing.
ROOT_PACKAGES = (
    "busybox-static",  # for hv debug: nothing else needs a shell
    "crun",
    "golang-github-containers-common",  # the default seccomp profile
    "libc6",
    "libexpat1",
    "libffi8",
    "libgcc-s1",
    "liblz4-1",  # for unpacking the kernel
    "liblzma5",
    "libpython3.11-minimal",
    "libpython3.11-stdlib",
    "python3.11-minimal",
    "zlib1g",
)

# Sample images.
BUSYBOX_PACKAGES = ("busybox-static",)
PYTHON_PACKAGES = (
    "libbz2-1.0",
    "libc6",
    "libcrypt1",
    "libexpat1",
    "libffi8",
    "libgcc-s1",
    "liblzma5",
    "libpython3.11-minimal",
    "libpython3.11-stdlib",
    "libsqlite3-0",
    "libssl3",
    "libuuid1",
    "python3.11-minimal",
    "zlib1g",
)

# Loaded in this order; what they depend on (by their own .modinfo) is put before them by the build. virtio's parts come
# first and in the order that was tried. ext4 and its helpers are built into the cloud kernel. vsock_loopback must never
# be here: with it a guest's connection to its own CID would not go where the agent listens for the host.
MODULES = (
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "virtio_blk",
    "vsock",
    "vmw_vsock_virtio_transport_common",
    "vmw_vsock_virtio_transport",
    "erofs",
    "overlay",
    "quota_v2",
    "virtio_net",
)

# Modules of Python's library that the agent may import later than at its start, where a look at its source does not
# tell, or that someone who debugs a guest will want. Everything else in the image is found from the agent's imports.
EXTRA_PYTHON_MODULES = (
    "asyncio",
    "base64",
    "ctypes",
    "encodings.ascii",
    "encodings.idna",
    "encodings.latin_1",
    "encodings.utf_8",
    "fcntl",
    "json",
    "logging",
    "resource",
    "select",
    "signal",
    "socket",
    "stat",
    "struct",
    "tarfile",
    "termios",
    "traceback",
)

# Imported by those behind `try:` or inside functions that the agent never calls; each brings a crowd along
# (_hashlib all of OpenSSL; without it hashlib uses the interpreter's own digests).
EXCLUDED_PYTHON_MODULES = (
    "_aix_support",
    "_bootsubprocess",
    "_hashlib",
    "_osx_support",
    "_pyio",
    "_pydecimal",
    "argparse",
    "asyncio.windows_events",
    "asyncio.windows_utils",
    "bz2",
    "calendar",
    "cProfile",
    "ctypes.util",
    "ctypes.macholib",
    "distutils",
    "doctest",
    "email",
    "ensurepip",
    "ftplib",
    "getopt",
    "gettext",
    "html",
    "http",
    "idlelib",
    "inspect.__main__",
    "lib2to3",
    "logging.config",
    "logging.handlers",
    "lzma",
    "mimetypes",
    "multiprocessing",
    "netrc",
    "nturl2path",
    "optparse",
    "pdb",
    "pickle",
    "platform",
    "profile",
    "pydoc",
    "pydoc_data",
    "py_compile",
    "smtplib",
    "socketserver",
    "sqlite3",
    "ssl",
    "sysconfig",
    "test",
    "tkinter",
    "turtledemo",
    "unittest",
    "urllib",
    "webbrowser",
    "xml",
    "xmlrpc",
    "zipapp",
    "zipfile",
)
