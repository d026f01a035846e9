"""/v1/pools"""

import time

from fastapi import APIRouter, status

from ringstone import models
from ringstone.api.context import ServiceDep
from ringstone.api.views import pool_view
from ringstone.errors import InvalidError
from ringstone.pools import keys
from ringstone.state import PoolRecord
from ringstone.state.records import JsonValue

router = APIRouter(prefix="/pools", tags=["pools"])


@router.get("")
def list_pools(service: ServiceDep) -> list[models.Pool]:
    """By name."""
    return [pool_view(service, record) for record in service.store.pools()]


@router.post("", status_code=status.HTTP_201_CREATED)
def create_pool(body: models.PoolCreate, service: ServiceDep) -> models.Pool:
    if body.faults is not None and body.type != "faulty":
        raise InvalidError("Only faulty pools take faults; leave them out.")
    if body.rbd is not None and body.type != "rbd":
        raise InvalidError("Only rbd pools take the options of a Ceph cluster; leave them out.")
    if body.store is not None and body.type != "store":
        raise InvalidError(
            "Only store pools take a size, an extent, an overcommit and a key; leave them out."
        )
    service.refuse_other_host(body.host)
    options: dict[str, JsonValue] = {"direct": body.direct} if body.type in ("file", "faulty") else {}
    if body.type == "faulty":
        options |= (body.faults or models.Faults()).model_dump()
    if body.rbd is not None:
        options |= body.rbd.model_dump(exclude_none=True)
    if body.store is not None:
        options |= body.store.model_dump(exclude_none=True)
    record = PoolRecord(body.name, body.type, body.path, body.capacity, time.time_ns(), options)
    return pool_view(service, service.pools.create(record, hugepages=body.hugepages, erase=body.erase))


@router.get("/{name}")
def show_pool(name: str, service: ServiceDep) -> models.Pool:
    return pool_view(service, service.store.pool(name))


@router.post("/{name}/grow")
def grow_pool(name: str, service: ServiceDep, body: models.PoolGrow | None = None) -> models.Pool:
    """Use all of a store pool's drive that has become longer; volumes are served meanwhile."""
    service.pools.grow(name, body.size if body else None)
    return pool_view(service, service.store.pool(name))


@router.post("/{name}/rekey")
def rekey_pool(name: str, service: ServiceDep, body: models.PoolRekey) -> models.Pool:
    """Have another key wrap the keys of a store pool's encrypted volumes; they are served meanwhile."""
    source = keys.of(body.model_dump(exclude_none=True))
    if source is None:
        raise InvalidError("Name the new key: key_file, key_command or key_credential.")
    service.pools.rekey(name, source)
    return pool_view(service, service.store.pool(name))


@router.post("/{name}/scrub")
def scrub_pool(name: str, service: ServiceDep, body: models.ScrubStart | None = None) -> models.Pool:
    """Begin to read all that a store pool has in use; `scrub` of the pool tells how far it is. One that runs goes on at
    the new rate."""
    service.pools.begin_scrub(name, (body or models.ScrubStart()).rate)
    return pool_view(service, service.store.pool(name))


@router.delete("/{name}/scrub", status_code=status.HTTP_204_NO_CONTENT)
def cancel_scrub(name: str, service: ServiceDep) -> None:
    """Nothing happens where none runs."""
    service.pools.cancel_scrub(name)


@router.delete("/{name}", status_code=status.HTTP_204_NO_CONTENT)
def delete_pool(name: str, service: ServiceDep) -> None:
    """The pool must have no volumes."""
    service.pools.delete(name)
