"""Admission: what happens to a request between its authorization and the registry."""
