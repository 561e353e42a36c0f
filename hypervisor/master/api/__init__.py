"""The API server over HTTPS."""
