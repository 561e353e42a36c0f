"""The master server of the orchestration control plane: API server, scheduler and controllers over one store."""
