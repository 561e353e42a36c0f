"""The pod VM agent: PID 1 in the guest.

Standard library only (the guest carries no other package), and only the part of it that `guest-images/` packs. The
host side imports two modules from here, `wire` (the protocol) and `logs` (the log file format), and nothing else.
"""
