"""The host's side of the pod network: addresses, taps, routes, packet filter. Knows no VMs, no Kubernetes objects."""
