"""Port-forward into pods: over SPDY, over SPDY tunnelled in a WebSocket, and over a plain WebSocket."""
