"""A host's name server for its pods: the cluster's names from what it is told, others from the host's own servers."""
