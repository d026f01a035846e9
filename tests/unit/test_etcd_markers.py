"""Markers that stores leave in etcd when they are not closed."""

import json
from typing import Any, cast

import pytest

from ringstone.state.etcd_client import EtcdClient, decode, encode
from ringstone.state.etcd_transaction import Committer, Snapshot

PREFIX = "/p/transactions/"
DAY_S = 86_400.0


class FakeEtcd:
    """Keys in memory, for ranges by pages and for commits that all succeed."""

    def __init__(self) -> None:
        self.keys: dict[str, str] = {}

    def read(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        begin, end = decode(body["key"]), decode(body["range_end"])
        found = [key for key in sorted(self.keys) if begin <= key < end][: body["limit"]]
        return {"kvs": [{"key": encode(key), "value": encode(self.keys[key])} for key in found]}

    def write(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        for one in body["success"]:
            if put := one.get("request_put"):
                self.keys[decode(put["key"])] = decode(put["value"])
            else:
                self.keys.pop(decode(one["request_delete_range"]["key"]), None)
        return {"succeeded": True}

    def mark(self, name: str, state: str, at_ns: int) -> None:
        self.keys[PREFIX + name] = json.dumps({"state": state, "at_ns": at_ns})


def test_markers_of_stores_that_were_not_closed_go_after_a_day(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first page of markers was ever looked at, so that 500 void ones, which stay, hid all others. And a host
    whose clock was a day slow had its markers removed while it still asked for them."""
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    etcd = FakeEtcd()
    for number in range(1200):
        etcd.mark(f"{number:04}", "void", 0)
    etcd.mark("9999", "done", 0)
    client = cast(EtcdClient, etcd)
    committer = Committer(client, PREFIX)
    committer.sweep()
    committer.commit(Snapshot(client), [])
    assert PREFIX + "9999" in etcd.keys
    now[0] += DAY_S
    committer.commit(Snapshot(client), [])
    assert PREFIX + "9999" not in etcd.keys
    assert sum(json.loads(value)["state"] == "void" for value in etcd.keys.values()) == 1200
