"""Fixtures of the functional tests."""

from tests.framework.gateway import gateway

__all__ = ["gateway"]
