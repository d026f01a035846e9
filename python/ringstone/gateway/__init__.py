"""The gateway: what exists on this host, and the engine that serves it."""
