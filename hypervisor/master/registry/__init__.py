"""Kubernetes objects over a store: metadata, optimistic locking, lists, watches, deletion."""
