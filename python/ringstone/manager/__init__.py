"""The manager: one REST API over all hosts, and failover. It keeps nothing of its own: any number may run at once."""
