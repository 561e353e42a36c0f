"""Builds the pod VMs' guest image and the sample OCI images from Debian packages; standard library only.

Runs with the system's own Python, before the project's venv exists: ``python3 -m builder image`` in `guest-images/`.
Packages are downloaded and unpacked, never installed on this machine. Each step is a module: `packages` (what goes in,
as data), `debs` (download, unpack), `elf`, `initrd`, `pyroot` and `root` (the two file systems), `seccomp`, `kernel`,
`manifest`, `oci` and `samples`, and `stamp` (is it up to date). docs/guest-image.md says how they fit together.
"""
