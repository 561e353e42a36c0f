"""This host as a node of a Kubernetes cluster: a client of its API server, and the server that a kubelet is to it."""
