"""/v1/gateway, /v1/health and /v1/events"""

import os
from typing import Annotated

from fastapi import APIRouter, Query, Request

from ringstone import models
from ringstone.api.context import ContextDep, ServiceDep
from ringstone.api.health import health_of
from ringstone.api.views import pool_view, volume_views
from ringstone.errors import UnreachableError
from ringstone.gateway.handover import Upgrade
from ringstone.gateway.service import Service
from ringstone.state import Store
from ringstone.state.settings import is_away
from ringstone.units import utc
from ringstone.version import version

router = APIRouter(tags=["gateway"])


@router.get("/gateway")
def show_gateway(context: ContextDep) -> models.GatewayInfo:
    config = context.config
    pools, volumes, attachments = _counts(context.service.store)
    return models.GatewayInfo(
        version=version(),
        engine_version=context.engine_version,
        pid=os.getpid(),
        started_at=utc(context.started_ns),
        cores=sorted(context.service.reactor_cores()),
        idle_us=config.idle_us,
        state_dir=str(config.state_dir),
        run_dir=str(config.run_dir),
        socket=str(config.socket),
        stats_path=str(config.stats_path),
        pools=pools,
        volumes=volumes,
        attachments=attachments,
        upgrade=_upgrade(context.upgrade),
    )


def _counts(store: Store) -> tuple[int | None, int | None, int | None]:
    """Of pools, volumes and attachments; nothing while the state is out of reach."""
    try:
        return len(store.pools()), len(store.volumes()), len(store.attachments())
    except UnreachableError:
        return None, None, None


def _upgrade(upgrade: Upgrade | None) -> models.Upgrade | None:
    if upgrade is None:
        return None
    return models.Upgrade(
        from_version=upgrade.from_version,
        to_version=upgrade.to_version,
        volumes=upgrade.volumes,
        stall_ms=upgrade.stall_ns / 1e6,
        at=utc(upgrade.at_ns),
    )


@router.get("/health")
async def show_health(request: Request) -> models.Health:
    """Looks at every pool, volume and attachment. Comes back though one of them hangs, and says so."""
    return await health_of(request)


def look_at(service: Service) -> models.Health:
    try:
        reasons = _troubles(service)
    except UnreachableError as error:
        reasons = [f"What is attached is served, but the state is out of reach: {error.message}"]
    return models.Health(status="degraded" if reasons else "ok", reasons=reasons)


def _troubles(service: Service) -> list[str]:
    reasons = []
    if is_away(service.store):
        reasons.append("What this host owned is served, but etcd has not answered since the gateway's start.")
    reasons += [
        f"Pool {pool.name} has failed: {pool.reason}"
        for pool in (pool_view(service, record) for record in service.store.pools())
        if pool.state == "failed"
    ]
    for volume in volume_views(service, service.store.volumes()):
        if volume.state != "ready":
            reasons.append(f"Volume {volume.name} is {volume.state}: {volume.reason or 'see the events.'}")
        if volume.attachment and volume.attachment.state in ("failed", "needs_reset"):
            detail = volume.attachment.reason or "reset the device from its guest."
            reasons.append(f"The attachment of volume {volume.name} is {volume.attachment.state}: {detail}")
    return reasons


@router.get("/events")
def list_events(
    service: ServiceDep, limit: Annotated[int, Query(ge=1, le=1000)] = 100, volume: str | None = None
) -> list[models.Event]:
    """The latest `limit` events since the gateway's start, oldest first."""
    return [
        models.Event(at=utc(event.at_ns), level=event.level, volume=event.volume, message=event.message)
        for event in service.events.latest(1000)
        if volume is None or event.volume == volume
    ][-limit:]
