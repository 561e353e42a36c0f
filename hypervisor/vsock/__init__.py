"""AF_VSOCK between host and guest: the kernel's where it exists, else this project's vhost-user back end."""
