"""Addresses that the master gives away: of Services, of node ports, of nodes' pods."""
