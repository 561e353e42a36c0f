"""Pod VM controllers and the host daemon that owns them: Kubernetes pods in, VMs out."""
