"""Guest memory: page-frame database, address spaces and the fault server (faces of csrc/memory). Knows no VMs."""
