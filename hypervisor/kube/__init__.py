"""The Kubernetes API as both of its ends see it: resources, errors, selectors, quantities, a client and informers."""
