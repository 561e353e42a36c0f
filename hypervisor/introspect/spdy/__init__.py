"""SPDY/3.1, as far as Kubernetes' streams use it: what API servers speak to nodes, and older clients to servers."""
