"""OCI images in, read-only EROFS virtual disks out; content-addressed, built once, shared by every pod of the host."""
