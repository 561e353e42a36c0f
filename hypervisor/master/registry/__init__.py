"""Objects over the store: identity, versions, optimistic locking, watch caches."""
