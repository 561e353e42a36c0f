"""Per-CPU private data areas (face of csrc/percpu): counters and rings that threads and processes share without waiting
for each other.

Knows no VMs. Source: US 10331556.
"""
