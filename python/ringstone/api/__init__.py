"""The gateway's control API: HTTP on a Unix socket, a router per noun under /v1."""
