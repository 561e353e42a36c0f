"""Snapshots of VMs that ran: files, manifest, chain. Knows VMs, and no pods."""
