"""Jobs of the independent client that run to their end."""

from typing import Any

from ringstone.bench.process import run_job


def verify(socket: str, *, queues: int = 1, operations: int = 2_000, **more: Any) -> dict[str, Any]:
    """Writes, reads, discards, zeroes and flushes at random, each answer held against a model of the volume."""
    job = {"mode": "verify", "socket": socket, "operations": operations, "queues": queues, **more}
    report: dict[str, Any] = run_job("load", job)
    return report


def script(socket: str, operations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results of requests, one after another, all of which must succeed."""
    report = run_job("load", {"mode": "script", "socket": socket, "operations": operations})
    results: list[dict[str, Any]] = report["results"]
    assert all(one["status"] == "ok" for one in results), results
    return results
