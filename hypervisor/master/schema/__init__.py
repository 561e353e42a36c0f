"""Types of the kinds, from the OpenAPI schema that Kubernetes publishes."""
